"""Presets: token merging and a feature cache that were measured together, by name."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from tomesd_plus.caching import FeatureCacheConfig, FeatureCacheReport, apply_feature_cache, remove_feature_cache
from tomesd_plus.caching.cache import feature_cache_on
from tomesd_plus.config import ToMeConfig
from tomesd_plus.host import finest_level, unet_of
from tomesd_plus.pipeline import apply_token_merging, remove_token_merging
from tomesd_plus.report import TokenMergingReport


@dataclass(frozen=True)
class Preset:
    """What a name stands for.

    Args:
        description: For whom it is, in a line.
        merging: What to merge; its ``max_downsample`` is raised to the model's finest level that has self-attention.
            ``None``: nothing.
        cache: When the whole UNet runs; ``None``: always.
    """

    description: str
    merging: ToMeConfig | None = None
    cache: FeatureCacheConfig | None = None

    def merging_for(self, pipe: Any) -> ToMeConfig | None:
        """The merging for a pipeline or UNet: SDXL has no self-attention at full resolution."""
        if self.merging is None:
            return None
        return replace(self.merging, max_downsample=max(self.merging.max_downsample, finest_level(unet_of(pipe))))


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "quality": Preset(
            "nearly the same picture",
            ToMeConfig(ratio=0.5, whole_every=4),
            None,
        ),
        "balanced": Preset(
            "about three times as fast, close to the picture",
            ToMeConfig(ratio=0.5, merge_cross_attention=True, merge_mlp=True, whole_every=12, plan_every="full"),
            FeatureCacheConfig(interval=3),
        ),
        "fast": Preset(
            "about four times as fast, the same subject",
            ToMeConfig(ratio=0.5, merge_cross_attention=True, merge_mlp=True, whole_every=15, plan_every="full"),
            FeatureCacheConfig(interval=5),
        ),
    }
)
"""From the closest picture to the fastest."""


@dataclass(frozen=True)
class PresetReport:
    """Live reports of what a preset has switched on.

    Args:
        merging: Of token merging; ``None`` if the preset has none.
        cache: Of the feature cache; ``None`` likewise.
    """

    merging: TokenMergingReport | None
    cache: FeatureCacheReport | None

    def __str__(self) -> str:
        return "\n\n".join(str(report) for report in (self.merging, self.cache) if report is not None)


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
        >>> image = pipe("a large star on a blue background", num_inference_steps=4).images[0]
        >>> report.cache.full
        2
    """
    chosen = preset_by_name(name)
    merging_config = chosen.merging_for(pipe)
    with ExitStack() as undo:
        merging = cache = None
        if merging_config is not None:
            merging = apply_token_merging(pipe, merging_config)
            undo.callback(remove_token_merging, pipe)
        if chosen.cache is not None:
            cache = apply_feature_cache(pipe, chosen.cache)
        undo.pop_all()
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
        remove_preset(pipe)


def preset_by_name(name: str) -> Preset:
    """A preset; raises ValueError with the names there are."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]
