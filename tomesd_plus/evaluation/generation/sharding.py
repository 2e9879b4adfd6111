"""Sharding: which process generates which items."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.items import Item


@dataclass(frozen=True)
class Share:
    """The items of one process: every ``count``-th item, starting with ``index``.

    accelerate's ``split_between_processes`` needs a process group, in which independent machines would wait for each
    other, and splits into contiguous blocks.

    Args:
        index: Index of this process, from 0.
        count: Total number of processes.
        launched: Number of processes that a launcher started together with this one.
    """

    index: int = 0
    count: int = 1
    launched: int = 1

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Select the items of this process."""
        return list(items[self.index :: self.count])

    @classmethod
    def here(cls, shard: str | None = None, environment: Mapping[str, str] = os.environ) -> "Share":
        """The share of this process, from the launcher's environment (torchrun, accelerate) and the user's shard.

        No process group is created: the processes do not communicate.

        Args:
            shard: ``"i/n"``, i from 0 to n − 1: this is run i of n independent runs, each of one or more processes.
            environment: The launcher's RANK and WORLD_SIZE.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
        if not match or int(match[1]) >= int(match[2]):
            raise EvaluationError(f"a shard is i/n with i from 0 to n − 1, such as 0/4, not {shard!r}")
        rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
        return cls(int(match[1]) * world + rank, int(match[2]) * world, world)
