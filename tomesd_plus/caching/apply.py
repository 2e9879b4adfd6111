"""Apply and remove a feature cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tomesd_plus.caching.cache import FeatureCache, feature_cache_on
from tomesd_plus.caching.config import FeatureCacheConfig
from tomesd_plus.caching.layers import skipped_layers
from tomesd_plus.caching.report import FeatureCacheReport
from tomesd_plus.host.denoisers import noise_levels_of, reader_of
from tomesd_plus.host.models import controlnets_of, denoiser_of, unet_of
from tomesd_plus.host.say import warn
from tomesd_plus.schedules import IntervalSchedule


def apply_feature_cache(
    pipe: Any, config: FeatureCacheConfig | int | IntervalSchedule | None = None, **options: Any
) -> FeatureCacheReport:
    """Run a pipeline's denoiser in full on some steps only, and on the others its outer layers, or nothing.

    What the skipped layers would give, the last full step gave, or the trend of the last two says (``forecast``): the
    deep layers change little from step to step. The idea is DeepCache's (https://arxiv.org/abs/2312.00858), and so
    are, on a CPU and without a forecast, the bits. Works with token merging and offloading in any order of applying
    and removing, and with ``torch.compile``: one graph for full steps and one for cached ones (an adaptive cache
    breaks the UNet's graph once). Steps that are skipped (``branch="nothing"``, or S in a ``plan``) call no layer at
    all, of any denoiser; their output is a forecast from those of the steps before. The pipeline's ControlNets are
    skipped with them, where they are called with the denoiser's batch, and run at every other step. What is kept is
    free again at the next generation's start, or once the cache is removed.

    Args:
        pipe: A diffusers pipeline with a UNet of Stable Diffusion 1.x, 2.x or XL, or the UNet itself; where steps
            are full or skipped, one with any UNet or transformer.
        config: When a step is full; ``FeatureCacheConfig()`` by default. A number or an :class:`IntervalSchedule` is
            taken as the interval.
        options: Fields of :class:`FeatureCacheConfig`, in place of ``config``.

    Returns:
        A report of which steps were full, which follows the pipeline as it runs.

    Raises:
        TypeError: ``pipe`` has no such model, or both a config and options are given.
        ValueError: A cache is on already, or an option is out of range.

    Example:
        >>> from tomesd_plus import apply_feature_cache, load_tiny_pipeline
        >>> pipe = load_tiny_pipeline()
        >>> report = apply_feature_cache(pipe, interval=2)
        >>> image = pipe("a large star on a blue background", num_inference_steps=4).images[0]
        >>> [step.full for step in report.steps]
        [True, False, True, False]

        >>> from tomesd_plus import feature_cache, remove_feature_cache
        >>> remove_feature_cache(pipe)
        >>> with feature_cache(pipe, plan="FFSCFS") as report:  # in full, its outer layers, or not at all
        ...     image = pipe("a large star on a blue background", num_inference_steps=6).images[0]
        >>> report.full, report.cached, report.skipped
        (3, 1, 2)
    """
    as_interval = config is not None and not isinstance(config, FeatureCacheConfig)
    clash = options.keys() & {"interval"} if as_interval else options.keys()
    if config is not None and clash:
        raise TypeError(f"give either a config or options, not both: {', '.join(clash)}")
    if not isinstance(config, FeatureCacheConfig):
        config = FeatureCacheConfig(**options if config is None else {"interval": config, **options})
    denoiser = _unet(pipe) if config.skips_layers else denoiser_of(pipe)
    if feature_cache_on(denoiser) is not None:
        raise ValueError("a feature cache is already applied: call remove_feature_cache first")
    cache = FeatureCache(config, noise_levels_of(pipe, config.follows_noise_level), reader_of(pipe))
    try:
        cache.attach(denoiser, {net: reader_of(pipe) for net in controlnets_of(pipe)})
    except BaseException:
        cache.detach(denoiser)
        raise
    return FeatureCacheReport(cache)


def remove_feature_cache(pipe: Any) -> None:
    """Undo :func:`apply_feature_cache`: nothing stays on the models. Warns if no cache is on.

    Raises:
        RuntimeError: It is called from inside of layers that a cached step skips.
    """
    denoiser = denoiser_of(pipe)
    cache = feature_cache_on(denoiser)
    if cache is None:
        warn("no feature cache is applied, so there is nothing to remove", stacklevel=2)
        return
    cache.check_removable()
    cache.detach(denoiser)


@contextmanager
def feature_cache(
    pipe: Any, config: FeatureCacheConfig | int | IntervalSchedule | None = None, **options: Any
) -> Iterator[FeatureCacheReport]:
    """Cache features inside a ``with`` block; takes what :func:`apply_feature_cache` takes, and yields its report."""
    report = apply_feature_cache(pipe, config, **options)
    try:
        yield report
    finally:
        remove_feature_cache(pipe)


def _unet(pipe: Any) -> Any:
    """The UNet of a pipeline, or the UNet itself, with what ``torch.compile`` has put around it."""
    try:
        unet_of(pipe)  # refuses what has none
    except TypeError as refused:
        try:
            model = denoiser_of(pipe)
        except TypeError:
            raise refused from None
        raise TypeError(
            f"cached steps run the outer layers of a UNet of Stable Diffusion, and {type(model).__name__} is none: "
            'skip whole calls instead, by branch="nothing" or a plan of F and S'
        ) from None
    return getattr(pipe, "unet", pipe)


def cached_steps_possible(pipe: Any) -> bool:
    """True if a pipeline's denoiser has outer layers that can run alone, as UNets of Stable Diffusion have."""
    try:
        skipped_layers(unet_of(pipe), 0)
    except TypeError:
        return False
    return True
