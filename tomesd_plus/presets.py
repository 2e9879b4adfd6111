"""Presets: token merging and a feature cache that go together, by name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from tomesd_plus.caching import (
    FeatureCacheConfig,
    FeatureCacheReport,
    IntervalSchedule,
    apply_feature_cache,
    remove_feature_cache,
)
from tomesd_plus.caching.cache import feature_cache_on
from tomesd_plus.host.models import finest_level, unet_of
from tomesd_plus.merging.apply import apply_token_merging, remove_token_merging
from tomesd_plus.merging.config import FullSteps, ToMeConfig
from tomesd_plus.merging.report import TokenMergingReport


@dataclass(frozen=True)
class Preset:
    """What a name stands for.

    Args:
        description: When the whole UNet runs, in a line.
        merging: What to merge where the outer layers have self-attention, as those of SD 1.x and 2.x have.
        merging_inside: What to merge where they have none, as in SDXL: there is nothing to merge on cached steps.
        cache: When the whole UNet runs.
    """

    description: str
    merging: ToMeConfig
    cache: FeatureCacheConfig
    merging_inside: ToMeConfig = field(default_factory=lambda: ToMeConfig(ratio=0.5, plan_per="block"))

    def merging_for(self, pipe: Any) -> ToMeConfig:
        """The merging for a pipeline or UNet."""
        finest = finest_level(unet_of(pipe))
        return self.merging if finest == 1 else replace(self.merging_inside, max_downsample=finest)


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
        "quality": Preset(
            "the whole UNet on every second step", _UNDER_A_CACHE, FeatureCacheConfig(interval=2, forecast=1.0)
        ),
        "balanced": Preset(
            "the whole UNet on every third step, in the last third on every fourth",
            _UNDER_A_CACHE,
            FeatureCacheConfig(interval=IntervalSchedule((3, 3, 4)), forecast=0.85),
        ),
        "fast": Preset(
            "the whole UNet, its inner layers merged, on every fourth step, in the last third on every fifth",
            replace(_UNDER_A_CACHE, full_steps=FullSteps("cache", ratio=0.5)),
            FeatureCacheConfig(interval=IntervalSchedule((4, 4, 5)), forecast=0.85),
        ),
    }
)
"""From the closest picture to the fastest."""


@dataclass(frozen=True)
class PresetReport:
    """Live reports of what a preset has switched on.

    Args:
        merging: Of token merging.
        cache: Of the feature cache.
    """

    merging: TokenMergingReport
    cache: FeatureCacheReport

    def __str__(self) -> str:
        return f"{self.merging}\n\n{self.cache}"


def apply_preset(pipe: Any, name: str) -> PresetReport:
    """Switch on token merging and a feature cache as a preset has them.

    Args:
        pipe: A diffusers pipeline with a UNet of Stable Diffusion 1.x, 2.x or XL, or the UNet itself.
        name: One of :data:`PRESETS`: ``"quality"``, ``"balanced"`` or ``"fast"``.

    Returns:
        Reports that follow the pipeline as it runs.

    Raises:
        TypeError: ``pipe`` has no such UNet.
        ValueError: There is no such preset, or merging or a cache is on already; then nothing is changed.

    Example:
        >>> from tomesd_plus import apply_preset, load_tiny_pipeline
        >>> pipe = load_tiny_pipeline()
        >>> report = apply_preset(pipe, "balanced")
        >>> image = pipe("a large star on a blue background", num_inference_steps=7).images[0]
        >>> report.cache.full
        2
    """
    chosen = preset_by_name(name)
    merging = apply_token_merging(unet_of(pipe), chosen.merging_for(pipe))  # a ControlNet has no cached steps
    try:
        cache = apply_feature_cache(pipe, chosen.cache)
    except BaseException:
        remove_token_merging(pipe)
        raise
    return PresetReport(merging, cache)


def remove_preset(pipe: Any) -> None:
    """Undo :func:`apply_preset`: token merging and the feature cache go, whoever has switched them on."""
    if feature_cache_on(pipe.unet if hasattr(pipe, "unet") else pipe) is not None:
        remove_feature_cache(pipe)
    remove_token_merging(pipe)


@contextmanager
def preset(pipe: Any, name: str) -> Iterator[PresetReport]:
    """Hold a preset inside a ``with`` block; takes what :func:`apply_preset` takes, and yields its reports."""
    reports = apply_preset(pipe, name)
    try:
        yield reports
    finally:
        remove_token_merging(pipe)
        remove_feature_cache(pipe)


def preset_by_name(name: str) -> Preset:
    """A preset; raises ValueError with the names there are."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]
