"""Which process generates which items."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.items import Item


@dataclass(frozen=True)
class Share:
    """The part of the items that falls to one process: every ``count``-th, from the one numbered ``index``.

    Args:
        index: This process's number, from 0.
        count: Processes in all.
        launched: Of these, how many a launcher started together with this one.
    """

    index: int = 0
    count: int = 1
    launched: int = 1

    def of(self, items: Sequence[Item]) -> list[Item]:
        """The items of this process."""
        return list(items[self.index :: self.count])

    @classmethod
    def here(cls, shard: str | None = None, environment: Mapping[str, str] = os.environ) -> "Share":
        """The share of this process, as the launcher (torchrun, accelerate) and the user say.

        The launcher's environment is read and no process group is made: the processes never talk to each other.

        Args:
            shard: ``"i/n"``, i from 0 to n − 1: which of n independent runs this is. Each may have many processes.
            environment: Where the launcher has set RANK and WORLD_SIZE.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
        if not match or int(match[1]) >= int(match[2]):
            raise EvaluationError(f"a shard is i/n with i from 0 to n − 1, such as 0/4, not {shard!r}")
        rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
        return cls(int(match[1]) * world + rank, int(match[2]) * world, world)
