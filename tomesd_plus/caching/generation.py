"""What a cache holds from a generation's first call to the next one's, and the record of what was done in it."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from tomesd_plus.caching.forecast import Features
from tomesd_plus.caching.outputs import Output
from tomesd_plus.host.step import Step, StepTracker
from tomesd_plus.host.transient import ThreadLocal

Kind = Literal["idle", "undecided", "full", "cached", "skipped"]
"""Of the denoiser's call under way; idle outside of calls."""


class WhyFull(StrEnum):
    """Why a step was full; the value is how it is said."""

    first_step = "first step"
    nothing_kept = "nothing kept"
    ambiguous = "calls are ambiguous"
    other_size = "other batch or size"
    listed = "listed"
    other_form = "other form of output"
    replaced = "forward was replaced"
    interval = "interval"
    same_noise_level = "same noise level"
    changed = "changed"
    attention_maps = "attention maps are read"


@dataclass(frozen=True)
class CacheStep:
    """One call of the denoiser in the latest generation.

    Args:
        index: Place in the scheduler's timesteps; ``None`` if the caller passed a timestep of its own.
        noise_level: 1 at the first, noisiest timestep of training, 0 at the last.
        reason: Why it was full; ``None`` if it was cached or skipped.
        change: Of the early feature since the last full step, as a share; ``None`` unless the choice depended on it.
        ahead: How far it followed the trend of the last two full steps, as a share of the way between them; 0 for
            full steps, for those that took what the last full step had left as it was, and for skipped ones.
        skipped: Nothing ran.
    """

    index: int | None
    noise_level: float
    reason: WhyFull | None
    change: float | None = None
    ahead: float = 0.0
    skipped: bool = False

    @property
    def kind(self) -> Literal["full", "cached", "skipped"]:
        """What ran: all layers, some, or nothing."""
        return "full" if self.full else "skipped" if self.skipped else "cached"

    @property
    def full(self) -> bool:
        """True if all layers ran."""
        return self.reason is not None


@dataclass
class CacheRecord:
    """What was done in one generation, as plain data.

    Args:
        steps: One entry a call of the denoiser; of a loop that never begins a new generation the latest.
        features: What full steps have left, by the number of the call in its step.
        outputs: What the last calls that ran have given, where others are skipped, likewise.
        late: Half of the schedule is over, where one is known.
        failed: A call has failed or was interrupted.
        judged: The user has been told that nothing was cached, or need not be.
    """

    steps: deque[CacheStep] = field(default_factory=lambda: deque(maxlen=1000))
    features: dict[int, Features] = field(default_factory=dict)
    outputs: dict[int, list[Output]] = field(default_factory=dict)
    late: bool = False
    failed: bool = False
    judged: bool = False

    def forget(self) -> None:
        """Free what is kept."""
        self.features, self.outputs = {}, {}


@dataclass
class Generation:
    """What a cache holds from a generation's first call to the next one's.

    Args:
        tracker: Reads the calls' steps.
        record: What was done, and what full steps have left.
        latest: The latest call's step.
        level_before: The noise level of the step before that.
        blank: The number of a step at which a ControlNet was skipped.
        maps_are_read: A host reads attention maps of layers that cached steps would leave out.
    """

    tracker: StepTracker
    record: CacheRecord = field(default_factory=CacheRecord)
    latest: Step | None = None
    level_before: float | None = None
    blank: int | None = None
    maps_are_read: bool = False

    def before(self, step: Step) -> float | None:
        """The noise level of the step before a step, which is the latest one or comes next."""
        if self.latest is None:
            return None
        return self.level_before if self.latest.number == step.number else self.latest.noise_level


class Current(ThreadLocal):
    """Where a thread is."""

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.step: Step | None = None
        self.kind: Kind = "idle"
        self.model: Any = None  # whose call is under way; ``None`` if its forward is called by itself
        self.nobody_wrote = False  # what goes from layer to layer now is memory that nobody wrote to
        self.outputs: dict[str, Any] = {}  # those of the call under way
        self.as_dict = True  # what the call under way is to return
        self.given: Any = None  # what it gives in place of running, if it is skipped
        self.waiting: list[Callable[[bool], None]] = []  # told of the call's kind once that is known

    def forget_call(self) -> None:
        """No call is under way any more: layers are ordinary ones, and nothing is held for it."""
        self.kind, self.outputs, self.waiting, self.given = "idle", {}, [], None
        self.model, self.nobody_wrote = None, False
