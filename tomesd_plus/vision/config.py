"""What is to be merged in a vision tower: options, their checks, and the number of tokens that each layer loses."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from tomesd_plus.vision.methods import METHODS

DEFAULT_R = 16  # what the paper's headline figures are for
MOST_R = 2**31 - 1
SIZES = 16  # adaptive merging leaves multiples of this share of the patches

R = int | Sequence[int] | tuple[int, float]
"""Tokens to remove in each layer: a number; a list with a number for each layer; or ``(r, inflection)``."""


@dataclass(frozen=True, eq=False)
class Protection:
    """Patches that are never removed.

    Args:
        mask: (1 or batch, patches), bool.
        shape: As it was given.
        most: How many are protected in a picture, at most.
    """

    mask: Tensor
    shape: tuple[int, ...]
    most: int


@dataclass(frozen=True, eq=False)
class TowerConfig:
    """Options of token merging in a vision tower; at most one of ``r``, ``ratio`` and ``similarity`` says how much.

    Args:
        r: Tokens to remove in each layer, as in Bolya et al., "Token Merging: Your ViT But Faster"
            (https://arxiv.org/abs/2210.09461): a number, at least 0; a list with a number for each layer; or ``(r,
            inflection)`` with an inflection in [−1, 1]: r in the middle and on average, growing from 0 to twice as
            many at 1, falling from twice as many to 0 at −1. A layer loses at most half of what may be merged. 16 by
            default.
        ratio: The share of the patch tokens to remove in all, in [0, 1), evenly over the layers.
        similarity: Adaptive merging: each layer removes as many tokens as have a partner of at least this cosine
            similarity, in [−1, 1], averaged over the batch, in steps of a sixteenth of the patches. Each layer waits
            for the device once, to read one number.
        method: ``"merging"``; ``"evit"``, which keeps what the class token attends to and fuses the rest; or
            ``"ats"``, which samples tokens by what they add to the class token: without ``r`` and ``ratio`` it keeps
            as many as the pictures of a batch need, in steps of a sixteenth of the patches, else as many as those say.
        protect: Patches that are never removed, a mask of bools: (patches,), (rows, columns) or, with another one for
            each picture of the batch, (batch, rows, columns). A picture with fewer of them than another of its batch
            keeps some of its first patches too.
        proportional_attention: Whether a token that stands for s tokens weighs s times in attention. ``None``: with
            merging it does, with the other methods it does not, as in their papers.
    """

    r: R | None = None
    ratio: float | None = None
    similarity: float | None = None
    method: str = "merging"
    protect: Any = None  # a Protection, once it is made
    proportional_attention: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("r", "ratio", "similarity") if getattr(self, name) is not None]
        if len(given) > 1:
            raise TypeError(f"give one of r, ratio and similarity, not {' and '.join(given)}")
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: choose from {', '.join(METHODS)}")
        if self.proportional_attention is not None and not isinstance(self.proportional_attention, bool):
            raise TypeError(f"proportional_attention is True, False or None, not {self.proportional_attention!r}")
        if not given and self.method != "ats":
            object.__setattr__(self, "r", DEFAULT_R)
        if self.r is not None:
            object.__setattr__(self, "r", _checked_r(self.r))
        if self.ratio is not None:
            _check_number("ratio", self.ratio, 0, 1)
            if self.ratio == 1:
                raise ValueError("ratio must be below 1: some tokens have to stay")
        if self.similarity is not None:
            _check_number("similarity", self.similarity, -1, 1)
            if self.method != "merging":
                raise ValueError(f"similarity is measured for method='merging' only, not for {self.method!r}")
        if self.protect is not None:
            object.__setattr__(self, "protect", _checked_mask(self.protect))

    @property
    def adaptive(self) -> bool:
        """Whether how much is removed depends on the pictures."""
        return self.r is None and self.ratio is None

    @property
    def weighs(self) -> bool:
        """Whether attention is proportional to what tokens stand for."""
        return self.method == "merging" if self.proportional_attention is None else self.proportional_attention

    def check_layers(self, layers: int) -> None:
        """Raise ValueError if there is a number for each layer of another number of layers."""
        if isinstance(self.r, list) and len(self.r) != layers:
            raise ValueError(f"r has {len(self.r)} numbers, but the tower has {layers} layers")

    def removed(self, layer: int, layers: int, patches: int) -> int:
        """How many tokens a layer is to remove, where that does not depend on the picture.

        Args:
            layer: Its index.
            layers: How many the tower has.
            patches: Of the picture.

        Example:
            >>> [TowerConfig(r=(8, -1)).removed(layer, 4, 196) for layer in range(4)]
            [16, 10, 5, 0]
            >>> [TowerConfig(ratio=0.5).removed(layer, 4, 25) for layer in range(4)]
            [3, 3, 3, 3]
        """
        if self.ratio is not None:
            total = int(self.ratio * patches)
            return total * (layer + 1) // layers - total * layer // layers
        if isinstance(self.r, list):
            return self.r[layer]
        if isinstance(self.r, tuple):
            r, inflection = self.r
            first = int(r * (1 - inflection))  # rounded as the authors do
            return r if layers == 1 else int(first + (2 * r - 2 * first) * layer / (layers - 1))
        return self.r if isinstance(self.r, int) else 0


def _checked_r(r: Any) -> Any:
    """R with plain numbers: a number, a list of its own, or a tuple."""
    if isinstance(r, tuple):
        if len(r) != 2:
            raise TypeError(f"a tuple is (r, inflection), not {r!r}: give a number for each layer as a list")
        _check_number("the inflection", r[1], -1, 1)
        return _count(r[0]), float(r[1])
    if isinstance(r, Sequence) and not isinstance(r, str | bytes | bytearray | memoryview):
        return [_count(each) for each in r]
    return _count(r)


def _count(r: Any) -> int:
    if isinstance(r, Real) and not isinstance(r, Integral):
        raise TypeError(f"r is a number of tokens, not {r!r}: give a share of the patches as ratio=")
    if isinstance(r, bool) or not isinstance(r, Integral):
        raise TypeError(f"r is a number, a list of numbers or (r, inflection), not {r!r}")
    count = int(r)
    if count < 0:
        raise ValueError(f"r must not be negative, but is {r}")
    if count > MOST_R:
        raise ValueError(f"r is a number of tokens, at most {MOST_R}")
    return count


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a number, not {value!r}")
    number: Any = value
    if not low <= number <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], not {value!r}")


def _checked_mask(protect: Any) -> "Protection":
    if isinstance(protect, Protection):
        return protect
    expected = "protect is a mask of bools, (patches,), (rows, columns) or (batch, rows, columns)"
    try:
        mask = torch.as_tensor(protect).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{expected}, not {protect!r}: {error}") from error
    if mask.dtype != torch.bool or not 1 <= mask.ndim <= 3 or not mask.numel():
        raise TypeError(f"{expected}, not {str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}")
    rows = mask.reshape(len(mask) if mask.ndim == 3 else 1, -1).clone()
    return Protection(rows, tuple(mask.shape), int(rows.sum(dim=1).max()))
