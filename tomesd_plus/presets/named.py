"""The presets by name."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from tomesd_plus.caching import FeatureCacheConfig
from tomesd_plus.merging.config import FullSteps, ToMeConfig
from tomesd_plus.presets.data import Preset
from tomesd_plus.schedules import StepPlan

# Under a cache all that a cached step runs is its outer layers, and at its full steps these leave each token's offset
# from its group's mean: so cached steps can merge three quarters of the tokens, in all layers.
UNDER_A_CACHE = ToMeConfig(
    ratio=0.75, layers=("self_attention", "cross_attention", "mlp"), full_steps="cache", plan_per="block"
)
"""Merge on cached steps."""
ON_ALL_STEPS = replace(UNDER_A_CACHE, full_steps=FullSteps("cache", ratio=0.5))
"""And on full ones half of the tokens around self-attention, in the layers that cached steps skip."""


def _cache(pattern: str) -> FeatureCacheConfig:
    return FeatureCacheConfig(plan=StepPlan(pattern, repeats=True), forecast=0.85, order=1)


# Chosen among 12 patterns, with and without merging, on eight captions and five solvers. Merging on all steps makes a
# plan a seventh faster for 1 to 2 dB, where a full step fewer costs 3 at the speed of "fast", but less at many steps
# and at the speeds of the others.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "quality": Preset("every second step in full, the others cached", None, _cache("FC")),
        "balanced": Preset("every third step in full, then one cached and one skipped", None, _cache("FCS")),
        "fast": Preset(
            "every fourth step in full, a cached one between two skipped; tokens merged", ON_ALL_STEPS, _cache("FSCS")
        ),
    }
)
"""From the closest picture to the fastest."""


def preset_by_name(name: str) -> Preset:
    """A preset; raises ValueError with the names there are."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]
