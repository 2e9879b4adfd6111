"""Schedules by name, as commands and configuration files call them."""

from enum import StrEnum

from tomesd_plus.schedule import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule, StepsSchedule

SPREAD = 0.4  # between the noisy and the clean end of a schedule, where its mean leaves room for it
SCHEDULES: dict[str, Schedule] = {
    "constant": ConstantSchedule(0.5),
    "linear": LinearSchedule(0.5 + SPREAD / 2, 0.5 - SPREAD / 2),
    "cosine": CosineSchedule(0.5 + SPREAD / 2, 0.5 - SPREAD / 2),
    "steps": StepsSchedule((0.5 + SPREAD / 2, 0.5, 0.5 - SPREAD / 2)),
}


class Direction(StrEnum):
    """At which end of the noise levels a schedule merges more."""

    noisy = "noisy"
    clean = "clean"


def make_schedule(name: str, mean: float, more_at: Direction = Direction.noisy, maximum: float = 0.75) -> Schedule:
    """A schedule by name with a mean ratio; raises ValueError with what is allowed."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose from {', '.join(SCHEDULES)}")
    if not 0 <= mean < 1:
        raise ValueError(f"a ratio must lie in [0, 1), not {mean:g}")
    if mean > maximum:
        raise ValueError(
            f"a ratio of {mean:g} is more than the cells allow, which is {maximum:g} (0.75 for 2 × 2 tokens)"
        )
    schedule = SCHEDULES[name].with_mean(mean, maximum)
    return schedule if more_at is Direction.noisy else schedule.reversed()
