"""Checks of numbers that configurations share."""

from collections.abc import Sequence
from math import isfinite
from typing import Any


def is_number(value: Any) -> bool:
    """True for a finite number; ``True`` and ``False`` are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def is_whole(value: Any, minimum: int) -> bool:
    """True for a whole number of at least so much; ``True`` and ``False`` are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def check_ratios(ratios: Sequence[float]) -> None:
    """Raise ValueError if one is no number in [0, 1)."""
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
            raise ValueError(f"a ratio must be a number in [0, 1), not {ratio!r}")
