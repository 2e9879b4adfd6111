"""What is generated: a prompt and a seed; and which process generates it."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tomesd_plus.evaluation.errors import EvaluationError


@dataclass(frozen=True)
class Item:
    """One image to generate, under every configuration.

    Args:
        prompt_id: The prompt's place in its source.
        prompt: The caption.
        seed: Tells the images of one prompt apart.
    """

    prompt_id: str
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files. It changes with the prompt, so that another prompt's image is never taken for this one's."""
        return f"{self.prompt_id}-{self.seed}-{self._digest(0)[:8]}"

    def noise_seed(self, offset: int = 0) -> int:
        """Seed of the generator of its noise: a hash of the item.

        So the noise depends neither on the batch nor on the order nor on the process. It is the same for every
        configuration, whose images can therefore be compared one by one.

        Args:
            offset: Added to the seed, for another set of noises.
        """
        return int(self._digest(offset)[:15], 16)

    def _digest(self, offset: int) -> str:
        return hashlib.sha256(json.dumps([self.prompt_id, self.prompt, self.seed + offset]).encode()).hexdigest()


def make_items(prompts: Iterable[tuple[str, str]], seeds: Sequence[int] = (0,)) -> list[Item]:
    """Each of the prompts, (id, text), with each of the seeds."""
    return [Item(prompt_id, text, seed) for prompt_id, text in prompts for seed in seeds]


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
