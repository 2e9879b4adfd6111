"""What lasts from apply to remove."""

from dataclasses import dataclass, field

from tomesd_plus.host.transient import Transient
from tomesd_plus.vision.call import Call, Current
from tomesd_plus.vision.config import TowerConfig


@dataclass(eq=False)
class Attachment:
    """What all hooks of a tower share; it is copied and pickled with them.

    Args:
        config: What to merge.
        tower: The tower's name.
        names: Of the layers.
        prefix: Tokens before the patches.
        warned: Whether it has been said that nothing is merged.
        latest: The latest forward pass.
        current: What each thread has under way.
    """

    config: TowerConfig
    tower: str
    names: list[str]
    prefix: int
    warned: bool = False
    latest: Transient[Call] = field(default_factory=Transient)
    current: Current = field(default_factory=Current)
