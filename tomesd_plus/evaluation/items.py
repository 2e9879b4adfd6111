"""Items: a prompt and a seed, from which every configuration makes one image."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
