"""Switch presets on and off."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tomesd_plus.caching import FeatureCacheReport, apply_feature_cache, remove_feature_cache
from tomesd_plus.caching.cache import feature_cache_on
from tomesd_plus.host.models import denoiser_of, unet_of, unwrapped
from tomesd_plus.host.names import model_name, scheduler_name
from tomesd_plus.host.say import warn
from tomesd_plus.host.transformers import is_known_transformer
from tomesd_plus.merging.apply import apply_token_merging, is_merging, merged_models, remove_token_merging
from tomesd_plus.merging.attachment import attachments_on
from tomesd_plus.merging.report import TokenMergingReport
from tomesd_plus.presets.data import Preset
from tomesd_plus.presets.named import PRESETS, preset_by_name
from tomesd_plus.presets.tested import FirstCall, Refusal, StepsCheck, first_calls_on


@dataclass(frozen=True)
class PresetReport:
    """Live reports of what a preset has switched on.

    Args:
        merging: Of token merging; ``None`` if it merges nothing.
        cache: Of the feature cache; ``None`` if it has none.
    """

    merging: TokenMergingReport | None
    cache: FeatureCacheReport | None

    def __str__(self) -> str:
        parts = [str(part) for part in (self.merging, self.cache) if part is not None]
        return "\n\n".join(parts) or "The preset switches nothing on."


def apply_preset(pipe: Any, chosen: str | Path | Preset, *, force: bool = False) -> PresetReport:
    """Switch on token merging and a feature cache as a preset has them.

    Args:
        pipe: A diffusers pipeline with a UNet of Stable Diffusion 1.x, 2.x or XL, or the UNet itself. A preset that
            caches no layers is taken by transformers of PixArt, Stable Diffusion 3 and Flux too, and one that also
            merges nothing by any denoiser; those by name cache layers.
        chosen: One of :data:`PRESETS`, ``"quality"``, ``"balanced"`` or ``"fast"``; a :class:`Preset`, as ``tune``
            gives it; or the path of a file that :meth:`Preset.save` has written.
        force: Keep a preset by name also where it is refused: with solvers and numbers of steps at which fewer steps
            were closer in the same time (``results/presets.csv``), and at 8 steps or fewer, where there is next to
            nothing to take from the step before. A generation then ends at its first call with a ValueError that says
            what to do.

    Returns:
        Reports that follow the pipeline as it runs. A preset that ``tune`` chose with fewer solver steps than the
        untouched pictures have warns where it is called with another number than its ``steps``.

    Raises:
        TypeError: ``pipe`` has no such model, or the preset caches layers that it does not have.
        ValueError: There is no such preset, its file is wrong, or merging or a cache is on already; then nothing is
            changed.

    Example:
        >>> from tomesd_plus import apply_preset, load_tiny_pipeline
        >>> pipe = load_tiny_pipeline()
        >>> report = apply_preset(pipe, "balanced")
        >>> image = pipe("a large star on a blue background", num_inference_steps=10).images[0]
        >>> report.cache.full
        4
    """
    found = preset_from(chosen)
    _check_layers(pipe, found)
    config = found.merging_for(pipe)
    merging = None if config is None else apply_token_merging(_merged_part(pipe), config)
    try:
        cache = None if found.cache is None else apply_feature_cache(pipe, found.cache)
    except BaseException:
        if merging is not None:
            remove_token_merging(_merged_part(pipe))
        raise
    _warn_of_another(pipe, found)
    own = feature_cache_on(denoiser_of(pipe))
    if own is not None and isinstance(chosen, str) and chosen in PRESETS and not force:
        FirstCall(Refusal(chosen), pipe, own).attach(denoiser_of(pipe))
    fewer = found.steps if found.measured is not None and found.steps != found.measured.steps else None
    if fewer is not None and own is not None and getattr(pipe, "scheduler", None) is not None:
        FirstCall(StepsCheck(fewer), pipe, own).attach(denoiser_of(pipe))
    elif fewer is not None:  # nothing tells the steps of a call
        warn(f"this preset is to be called with num_inference_steps={fewer}", stacklevel=2)
    return PresetReport(merging, cache)


def remove_preset(pipe: Any) -> None:
    """Undo :func:`apply_preset`: token merging and the feature cache go, whoever has switched them on.

    Raises:
        RuntimeError: It is called from inside of layers that are skipped, or whose tokens are merged.
    """
    denoiser = denoiser_of(pipe)
    cache = feature_cache_on(denoiser)
    if cache is not None:
        cache.check_removable()  # before anything goes
    for each in first_calls_on(denoiser):
        each.detach()
    if _merges(pipe):
        remove_token_merging(pipe)
    elif cache is None:
        warn("a preset is not applied, so there is nothing to remove", stacklevel=2)
    if cache is not None:
        remove_feature_cache(pipe)


@contextmanager
def preset(pipe: Any, chosen: str | Path | Preset, *, force: bool = False) -> Iterator[PresetReport]:
    """Hold a preset inside a ``with`` block; takes what :func:`apply_preset` takes, and yields its reports."""
    reports = apply_preset(pipe, chosen, force=force)
    try:
        yield reports
    finally:
        for each in first_calls_on(denoiser_of(pipe)):
            each.detach()
        try:
            if reports.merging is not None:
                remove_token_merging(_merged_part(pipe))
        finally:
            if reports.cache is not None:
                remove_feature_cache(pipe)


def preset_from(chosen: str | Path | Preset) -> Preset:
    """A preset by its name, from a file, or as it is.

    Raises:
        ValueError: There is no such name or file, or the file is wrong.
    """
    if isinstance(chosen, Preset):
        return chosen
    if isinstance(chosen, str) and chosen in PRESETS:
        return PRESETS[chosen]
    if not isinstance(chosen, (str, Path)):
        raise ValueError(f"expected a preset, its name or a path, not {chosen!r}")
    path = Path(chosen)
    try:
        if isinstance(chosen, str) and path.suffix != ".json" and len(path.parts) < 2 and not path.is_file():
            return preset_by_name(chosen)  # which tells the names
        return Preset.load(path)
    except OSError as error:
        raise ValueError(f"cannot read the preset {str(chosen)[:200]}: {error.strerror or error}") from error


def _merges(pipe: Any) -> bool:
    try:
        models = merged_models(pipe).values()
    except TypeError:  # a transformer in which tokens cannot be merged
        return False
    return any(is_merging(model) or attachments_on(model) for model in models)


def _merged_part(pipe: Any) -> Any:
    """What a preset merges in: the UNet alone, for a ControlNet has no cached steps; of a transformer the pipeline."""
    return pipe if is_known_transformer(unwrapped(denoiser_of(pipe))) else unet_of(pipe)


def _check_layers(pipe: Any, found: Preset) -> None:
    """Refuse a preset that caches layers where there are none to cache, with what works instead."""
    denoiser = unwrapped(denoiser_of(pipe))
    if found.cache is None or not found.cache.skips_layers:
        return
    try:
        unet_of(pipe)
    except TypeError:
        raise TypeError(
            f"this preset caches layers of a UNet of Stable Diffusion, and {type(denoiser).__name__} is none: let "
            "tune find one of full and skipped steps for this pipeline, or use apply_feature_cache(pipe, "
            "branch='nothing')"
        ) from None


def _warn_of_another(pipe: Any, found: Preset) -> None:
    """Say once if a preset was chosen on another model or scheduler."""
    if found.measured is None:
        return
    pairs = [("model", model_name(denoiser_of(pipe)), found.measured.model)]
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is not None:
        pairs.append(("scheduler", scheduler_name(scheduler), found.measured.scheduler))
    others = [f"{what} ({there}; here: {here})" for what, here, there in pairs if here != there]
    if others:
        warn(
            f"this preset was chosen on another {' and '.join(others)}: what it costs in fidelity here is not known. "
            "Call tune on this pipeline for one of its own.",
            stacklevel=3,
        )
