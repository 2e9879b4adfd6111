"""Ratios, intervals and depths as functions of the noise level."""

from tomesd_plus.schedules.adaptive import AdaptiveRatio
from tomesd_plus.schedules.intervals import IntervalSchedule
from tomesd_plus.schedules.named import AUTO, BEST, SCHEDULES, SPREAD, Direction, schedule_by_name
from tomesd_plus.schedules.plans import StepPlan
from tomesd_plus.schedules.ratios import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule, StepsSchedule

__all__ = [
    "AUTO",
    "BEST",
    "SCHEDULES",
    "SPREAD",
    "AdaptiveRatio",
    "ConstantSchedule",
    "CosineSchedule",
    "Direction",
    "IntervalSchedule",
    "LinearSchedule",
    "Schedule",
    "StepPlan",
    "StepsSchedule",
    "schedule_by_name",
]
