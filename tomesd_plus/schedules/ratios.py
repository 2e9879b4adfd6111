"""Ratio as a function of the noise level: how much to merge at which step.

The noise level is 1 at the first, noisiest timestep of training and 0 at a clean picture. Every schedule runs in both
directions: give it more at the noisy end or more at the clean end.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tomesd_plus.schedules.checks import check_ratios
from tomesd_plus.schedules.plateaus import plateau_at


class Schedule(ABC):
    """A function from noise level to ratio, both in [0, 1]. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, noise_level: float) -> float:
        """The share of tokens to remove at a noise level in [0, 1]."""

    @property
    @abstractmethod
    def ratios(self) -> tuple[float, ...]:
        """The ratios that define the schedule; every ratio that it gives lies between the least and the greatest."""

    @abstractmethod
    def replaced(self, ratios: Sequence[float]) -> "Schedule":
        """The same schedule with other defining ratios, in the order of :attr:`ratios`."""

    def mean(self, noise_levels: Sequence[float] | None = None) -> float:
        """The mean ratio over the given noise levels, or over 1,000 evenly spaced ones."""
        if noise_levels is None:
            noise_levels = [(i + 0.5) / 1000 for i in range(1000)]
        return math.fsum(map(self, noise_levels)) / len(noise_levels)

    def with_mean(self, mean: float, maximum: float = 0.75) -> "Schedule":
        """The same shape moved to another mean.

        Args:
            mean: The mean wanted, in [0, ``maximum``].
            maximum: No ratio exceeds this, nor falls below 0: where the moved shape would, it is flattened.

        Raises:
            ValueError: The mean is outside [0, ``maximum``].
        """
        if not 0 <= mean <= maximum:
            raise ValueError(f"a mean ratio of {mean} is impossible with ratios in [0, {maximum}]")
        old = self.mean()
        above, below = max(self.ratios) - old, old - min(self.ratios)
        scale = min(1.0, (maximum - mean) / above if above > 0 else 1.0, mean / below if below > 0 else 1.0)
        return self.replaced([min(max(mean + scale * (ratio - old), 0.0), maximum) for ratio in self.ratios])

    def reversed(self) -> "Schedule":
        """The same shape in the other direction: what was at noisy steps is at clean ones."""
        return self.replaced(self.ratios[::-1])

    def quantized(self, count: int = 4) -> "StepsSchedule":
        """The nearest schedule of ``count`` plateaus: few distinct token counts, so few recompilations.

        Raises:
            ValueError: ``count`` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        edges = [1 - i / count for i in range(count + 1)]
        grid = [[low + (high - low) * (i + 0.5) / 100 for i in range(100)] for high, low in pairwise(edges)]
        return StepsSchedule(tuple(self.mean(levels) for levels in grid))

    def plot(self, ax: Any = None, **kwargs: Any) -> Any:
        """Draw the ratio over the noise level, noisy steps on the left; returns matplotlib's axes.

        Args:
            ax: Axes to draw on; new ones by default.
            kwargs: Passed to ``ax.plot``.
        """
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(4, 2.5), layout="constrained").subplots()
        levels = [1 - i / 500 for i in range(501)]
        ax.plot(levels, [self(level) for level in levels], **kwargs)
        ax.set(xlabel="noise level", ylabel="ratio", xlim=(1, 0), ylim=(0, 1))
        return ax


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The same ratio at every step: tomesd.

    Args:
        ratio: In [0, 1).

    Raises:
        ValueError: It is outside its range.
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        check_ratios(self.ratios)

    def __call__(self, noise_level: float) -> float:
        return self.ratio

    @property
    def ratios(self) -> tuple[float, ...]:
        return (self.ratio,)

    def replaced(self, ratios: Sequence[float]) -> "ConstantSchedule":
        return ConstantSchedule(*ratios)


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """A straight line from the ratio at noise level 1 to the ratio at noise level 0.

    Args:
        noisy: The ratio at noise level 1, in [0, 1).
        clean: The ratio at noise level 0, in [0, 1).

    Raises:
        ValueError: A ratio is outside its range.
    """

    noisy: float = 0.7
    clean: float = 0.3

    def __post_init__(self) -> None:
        check_ratios(self.ratios)

    def __call__(self, noise_level: float) -> float:
        return self.clean + (self.noisy - self.clean) * noise_level

    @property
    def ratios(self) -> tuple[float, ...]:
        return (self.noisy, self.clean)

    def replaced(self, ratios: Sequence[float]) -> "LinearSchedule":
        return LinearSchedule(*ratios)


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """Half a cosine between the two ends, flat near both; the shape that SDTM uses.

    Args:
        noisy: The ratio at noise level 1, in [0, 1).
        clean: The ratio at noise level 0, in [0, 1).

    Raises:
        ValueError: A ratio is outside its range.
    """

    noisy: float = 0.7
    clean: float = 0.3

    def __post_init__(self) -> None:
        check_ratios(self.ratios)

    def __call__(self, noise_level: float) -> float:
        return self.clean + (self.noisy - self.clean) * (1 - math.cos(math.pi * noise_level)) / 2

    @property
    def ratios(self) -> tuple[float, ...]:
        return (self.noisy, self.clean)

    def replaced(self, ratios: Sequence[float]) -> "CosineSchedule":
        return CosineSchedule(*ratios)


@dataclass(frozen=True)
class StepsSchedule(Schedule):
    """Plateaus of equal length, from noisy to clean. Few distinct ratios are what ``torch.compile`` likes.

    Args:
        plateaus: Their ratios, each in [0, 1).

    Raises:
        ValueError: There is none, or a ratio is outside its range.

    Example:
        >>> [StepsSchedule((0.75, 0.5, 0.25))(level) for level in (1.0, 0.5, 0.0)]
        [0.75, 0.5, 0.25]
    """

    plateaus: tuple[float, ...] = (0.7, 0.5, 0.3)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plateaus", tuple(self.plateaus))
        if not self.plateaus:
            raise ValueError("StepsSchedule needs at least one plateau")
        check_ratios(self.plateaus)

    def __call__(self, noise_level: float) -> float:
        return plateau_at(self.plateaus, noise_level)

    @property
    def ratios(self) -> tuple[float, ...]:
        return self.plateaus

    def replaced(self, ratios: Sequence[float]) -> "StepsSchedule":
        return StepsSchedule(tuple(ratios))
