"""How many steps apart full ones are, as a function of the noise level."""

from dataclasses import dataclass

from tomesd_plus.schedules.checks import is_whole
from tomesd_plus.schedules.plateaus import plateau_at


@dataclass(frozen=True)
class IntervalSchedule:
    """Interval as a function of the noise level: plateaus of equal length, from noisy to clean.

    Args:
        intervals: One for each plateau, each at least 1; a smaller one means more full steps.

    Raises:
        ValueError: There is no plateau, or an interval is no whole number of at least 1.

    Example:
        >>> dense_at_both_ends = IntervalSchedule((2, 5, 5, 2))
        >>> [dense_at_both_ends(level) for level in (1.0, 0.6, 0.4, 0.0)]
        [2, 5, 5, 2]
    """

    intervals: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "intervals", tuple(self.intervals))
        if not self.intervals or not all(is_whole(each, 1) for each in self.intervals):
            raise ValueError(f"intervals must be whole numbers of at least 1, one or more, not {self.intervals!r}")

    def __call__(self, noise_level: float) -> int:
        """The interval at a noise level in [0, 1]."""
        return plateau_at(self.intervals, noise_level)
