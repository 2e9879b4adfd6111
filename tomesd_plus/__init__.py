"""Token merging for 🤗 diffusers' Stable Diffusion and 🤗 transformers' vision towers."""

from importlib import import_module
from typing import TYPE_CHECKING

from tomesd_plus.version import __version__ as __version__

if TYPE_CHECKING:
    from tomesd_plus import tomesd as tomesd
    from tomesd_plus.caching import (
        FeatureCacheConfig,
        FeatureCacheReport,
        IntervalSchedule,
        apply_feature_cache,
        feature_cache,
        remove_feature_cache,
    )
    from tomesd_plus.dispatch import apply_token_merging, merging_report, remove_token_merging, token_merging
    from tomesd_plus.merging.config import FullSteps, ToMeConfig
    from tomesd_plus.merging.processor import ToMeProcessor
    from tomesd_plus.merging.report import TokenMergingReport
    from tomesd_plus.presets import PRESETS, Preset, PresetReport, apply_preset, preset, remove_preset
    from tomesd_plus.schedules import (
        AdaptiveRatio,
        ConstantSchedule,
        CosineSchedule,
        LinearSchedule,
        Schedule,
        StepPlan,
        StepsSchedule,
    )
    from tomesd_plus.scope import generation
    from tomesd_plus.tiny import load_tiny_pipeline
    from tomesd_plus.tuning import Costs, tune
    from tomesd_plus.vision.report import TowerReport

__all__ = [
    "PRESETS",
    "AdaptiveRatio",
    "ConstantSchedule",
    "CosineSchedule",
    "Costs",
    "FeatureCacheConfig",
    "FeatureCacheReport",
    "FullSteps",
    "IntervalSchedule",
    "LinearSchedule",
    "Preset",
    "PresetReport",
    "Schedule",
    "StepPlan",
    "StepsSchedule",
    "ToMeConfig",
    "ToMeProcessor",
    "TokenMergingReport",
    "TowerReport",
    "apply_feature_cache",
    "apply_preset",
    "apply_token_merging",
    "feature_cache",
    "generation",
    "load_tiny_pipeline",
    "merging_report",
    "preset",
    "remove_feature_cache",
    "remove_preset",
    "remove_token_merging",
    "token_merging",
    "tomesd",
    "tune",
]

_HOMES = {
    "caching": [
        "FeatureCacheConfig",
        "FeatureCacheReport",
        "IntervalSchedule",
        "apply_feature_cache",
        "feature_cache",
        "remove_feature_cache",
    ],
    "dispatch": ["apply_token_merging", "merging_report", "remove_token_merging", "token_merging"],
    "merging.config": ["FullSteps", "ToMeConfig"],
    "merging.processor": ["ToMeProcessor"],
    "merging.report": ["TokenMergingReport"],
    "presets": ["PRESETS", "Preset", "PresetReport", "apply_preset", "preset", "remove_preset"],
    "schedules": [
        "AdaptiveRatio",
        "ConstantSchedule",
        "CosineSchedule",
        "LinearSchedule",
        "Schedule",
        "StepPlan",
        "StepsSchedule",
    ],
    "scope": ["generation"],
    "tiny": ["load_tiny_pipeline"],
    "tuning": ["Costs", "tune"],
    "vision.report": ["TowerReport"],
}
"""The module of each public name; ``tomesd`` is a module itself."""

if not TYPE_CHECKING:  # a type checker would take this for any name at all

    def __getattr__(name: str) -> object:
        """Load a public name when it is first used: the import of the package alone loads no torch."""
        home = next((home for home, names in _HOMES.items() if name in names), None)
        if home is not None:
            value = getattr(import_module(f"{__name__}.{home}"), name)
        elif name == "tomesd":
            value = import_module(f"{__name__}.tomesd")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
