"""Schedules by name, for commands and files."""

from enum import StrEnum

from tomesd_plus.schedules.checks import check_ratios
from tomesd_plus.schedules.ratios import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Schedule,
    StepsSchedule,
)


class Direction(StrEnum):
    """At which end of the noise levels a schedule merges more."""

    noisy = "noisy"
    clean = "clean"


SPREAD = 0.4  # between the noisy and the clean end of a schedule by name, where its mean leaves room for it
SCHEDULES: dict[str, Schedule] = {
    "constant": ConstantSchedule(0.5),
    "linear": LinearSchedule(0.5 + SPREAD / 2, 0.5 - SPREAD / 2),
    "cosine": CosineSchedule(0.5 + SPREAD / 2, 0.5 - SPREAD / 2),
    "steps": StepsSchedule((0.5 + SPREAD / 2, 0.5, 0.5 - SPREAD / 2)),
}
AUTO = "auto"
BEST = "cosine", Direction.noisy
"""What ``"auto"`` stands for: the closest pictures in the ablation on the embedded pipeline (see ``results/``)."""


def schedule_by_name(name: str, mean: float, more_at: str = Direction.noisy, maximum: float = 0.75) -> Schedule:
    """A schedule with a mean ratio.

    Args:
        name: One of :data:`SCHEDULES`, or ``"auto"``, which chooses the direction too.
        mean: Over all noise levels, in [0, 1).
        more_at: ``"noisy"`` or ``"clean"``.
        maximum: Ratio that the schedule may not exceed anywhere.

    Raises:
        ValueError: There is no such schedule or direction, or the mean is too high.
    """
    if name == AUTO:
        name, more_at = BEST
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose from {', '.join(SCHEDULES)}, {AUTO}")
    if more_at not in list(Direction):
        raise ValueError(f"more_at must be 'noisy' or 'clean', not {more_at!r}")
    check_ratios([mean])
    if mean > maximum:
        raise ValueError(
            f"a ratio of {mean:g} is more than the cells allow, which is {maximum:g} (0.75 for 2 × 2 tokens)"
        )
    schedule = SCHEDULES[name].with_mean(mean, maximum)
    return schedule if more_at == Direction.noisy else schedule.reversed()
