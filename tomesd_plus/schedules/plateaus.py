"""Plateaus of equal length over the noise levels."""

from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")


def plateau_at(plateaus: Sequence[Value], noise_level: float) -> Value:
    """The value at a noise level in [0, 1], of plateaus of equal length from noisy to clean."""
    index = int((1 - noise_level) * len(plateaus))
    return plateaus[min(max(index, 0), len(plateaus) - 1)]
