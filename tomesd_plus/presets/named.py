"""The presets by name."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from tomesd_plus.caching import FeatureCacheConfig, IntervalSchedule
from tomesd_plus.merging.config import FullSteps, ToMeConfig
from tomesd_plus.presets.data import Preset

# Under a cache all that a cached step runs is its outer layers, and at its full steps these leave each token's offset
# from its group's mean: so cached steps can merge three quarters of the tokens, in all layers, for 0.2 to 0.5 dB at
# intervals of 3 and 4 (at 2 with a forecast 3 dB, from 50.8). To merge around all layers on the full steps too costs
# several dB (``results/cache-and-merging.csv``). Forecasts are worth several dB; the rarer the full steps, the less
# far their trend holds (``results/grid-scores.csv``). Full steps are nearly all of the fastest preset's time: there it
# merges half of the tokens around self-attention in the layers that cached steps skip, for 1 dB where a full step
# fewer costs 2.
_UNDER_A_CACHE = ToMeConfig(
    ratio=0.75, layers=("self_attention", "cross_attention", "mlp"), full_steps="cache", plan_per="block"
)
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "quality": Preset("every second step in full", _UNDER_A_CACHE, FeatureCacheConfig(interval=2, forecast=1.0)),
        "balanced": Preset(
            "every third step in full, in the last third every fourth",
            _UNDER_A_CACHE,
            FeatureCacheConfig(interval=IntervalSchedule((3, 3, 4)), forecast=0.85),
        ),
        "fast": Preset(
            "every fourth step in full, its inner layers merged, in the last third every fifth",
            replace(_UNDER_A_CACHE, full_steps=FullSteps("cache", ratio=0.5)),
            FeatureCacheConfig(interval=IntervalSchedule((4, 4, 5)), forecast=0.85),
        ),
    }
)
"""From the closest picture to the fastest."""


def preset_by_name(name: str) -> Preset:
    """A preset; raises ValueError with the names there are."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]
