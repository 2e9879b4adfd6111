"""Token merging for 🤗 diffusers' Stable Diffusion."""

from tomesd_plus import tomesd
from tomesd_plus.caching import (
    FeatureCacheConfig,
    FeatureCacheReport,
    IntervalSchedule,
    apply_feature_cache,
    feature_cache,
    remove_feature_cache,
)
from tomesd_plus.merging.apply import apply_token_merging, remove_token_merging, token_merging
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
    StepsSchedule,
)
from tomesd_plus.scope import generation
from tomesd_plus.tiny import load_tiny_pipeline

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AdaptiveRatio",
    "ConstantSchedule",
    "CosineSchedule",
    "FeatureCacheConfig",
    "FeatureCacheReport",
    "FullSteps",
    "IntervalSchedule",
    "LinearSchedule",
    "Preset",
    "PresetReport",
    "Schedule",
    "StepsSchedule",
    "ToMeConfig",
    "ToMeProcessor",
    "TokenMergingReport",
    "apply_feature_cache",
    "apply_preset",
    "apply_token_merging",
    "feature_cache",
    "generation",
    "load_tiny_pipeline",
    "preset",
    "remove_feature_cache",
    "remove_preset",
    "remove_token_merging",
    "token_merging",
    "tomesd",
]
