"""Items: pairs of a prompt and a seed; each configuration generates one image per item."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One image to generate with each configuration.

    Args:
        prompt_id: The prompt's index in its source.
        prompt: The prompt.
        seed: Distinguishes several images of one prompt.

    Raises:
        ValueError: The id cannot be part of a file's name.
    """

    prompt_id: str
    prompt: str
    seed: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]{0,99}", self.prompt_id):  # it becomes part of files' names
            raise ValueError(f"a prompt's id must be up to 100 letters, digits, -, _ and ., not {self.prompt_id!r}")

    @property
    def name(self) -> str:
        """Name of the item's files, with a hash of the prompt: an image of another prompt is never mistaken for it."""
        return f"{self.prompt_id}-{self.seed}-{self._digest(0)[:8]}"

    def noise_seed(self, offset: int = 0) -> int:
        """Seed of the generator for the initial noise: a hash of the item.

        So the noise does not depend on batch, order or process. It is the same for every configuration, so that their
        images can be compared one to one.

        Args:
            offset: Added to the item's seed, for other noise.
        """
        return int(self._digest(offset)[:15], 16)

    def _digest(self, offset: int) -> str:
        return hashlib.sha256(json.dumps([self.prompt_id, self.prompt, self.seed + offset]).encode()).hexdigest()


def make_items(prompts: Iterable[tuple[str, str]], seeds: Sequence[int] = (0,)) -> list[Item]:
    """Combine every prompt, (id, text), with every seed."""
    return [Item(prompt_id, text, seed) for prompt_id, text in prompts for seed in seeds]
