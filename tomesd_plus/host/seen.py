"""What a tensor was when an earlier call was given it, to tell by it whether a later call is of the same picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIKE = 0.8
"""Cosine from which on two latents are taken for successive ones; those of two pictures are nearly at right angles."""
UNLIKE = 0.2
"""Cosine below which they are none."""


class Seen:
    """A tensor as it was at a call.

    The tensor is held, so that its memory cannot become another's. Its values are copied, for loops may write over
    it, as those for CUDA graphs do; no host waits for a copy.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._version = version_of(tensor)
        self.copy = self._tensor.clone()

    def is_it(self, other: Any) -> bool:
        """True if another is the same tensor, not written to since; no value is read for that."""
        mine = self._tensor
        return (
            isinstance(other, Tensor)
            and self._version is not None
            and (mine.data_ptr(), mine.shape, mine.stride(), mine.dtype, self._version)
            == (other.data_ptr(), other.shape, other.stride(), other.dtype, version_of(other))
        )

    def equals(self, other: Tensor) -> bool:
        """True if it has the same values, in the samples that both batches have."""
        if self.is_it(other):
            return True
        mine, its = self._in_common(other)
        return mine.shape == its.shape and torch.equal(mine, its)

    def likeness(self, other: Tensor) -> float:
        """Cosine of the angle to another of its size, over the samples that both batches have; 0 for other sizes."""
        mine, its = self._in_common(other)
        if mine.shape != its.shape:
            return 0.0
        return float(torch.cosine_similarity(mine.flatten().float(), its.flatten().float(), dim=0))

    def is_like(self, other: Tensor) -> bool:
        """True for two successive latents of one generation."""
        return self.equals(other) or self.likeness(other) > ALIKE

    def is_unlike(self, other: Tensor) -> bool:
        """True for latents that are nearly at right angles, as those of two pictures are."""
        return self.likeness(other) < UNLIKE and not self.equals(other)

    def _in_common(self, other: Tensor) -> tuple[Tensor, Tensor]:
        batch = min(len(self.copy), len(other))
        return self.copy[:batch], other.detach()[:batch].to(self.copy)


@dataclass(frozen=True, eq=False)
class SeenCall:
    """What a call was given.

    Args:
        latents: Its sample.
        text: What cross-attention saw, :class:`Seen` if it is a tensor.
    """

    latents: Seen
    text: Any

    @classmethod
    def of(cls, sample: Tensor, text: Any, before: Sequence["SeenCall"]) -> "SeenCall":
        """Note a call; what it shares with those before it is not copied again."""
        latents = next((call.latents for call in before if call.latents.is_it(sample)), None) or Seen(sample)
        if isinstance(text, Tensor):
            texts = (call.text for call in before if isinstance(call.text, Seen))
            text = next((seen for seen in texts if seen.is_it(text)), None) or Seen(text)
        return cls(latents, text)

    def goes_on(self, sample: Tensor, text: Any) -> bool:
        """True if another call may be the next step's."""
        return same_text(text, self.text) and self.latents.is_like(sample)


def same_text(text: Any, seen: Any) -> bool:
    """False if what two calls attend to is known to differ; without one of guidance's branches it is the same."""
    if not (isinstance(text, Tensor) and isinstance(seen, Seen)):
        return True
    if text.shape[1:] != seen.copy.shape[1:]:
        return False
    return len(text) != len(seen.copy) or seen.equals(text)


def version_of(tensor: Tensor) -> int | None:
    """Counts what is written to a tensor; one that was made for inference alone does not tell."""
    return None if tensor.is_inference() else tensor._version
