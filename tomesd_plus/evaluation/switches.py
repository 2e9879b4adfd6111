"""The methods that a configuration can switch on: this package's merging and cache, and comparable ones."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from diffusers.schedulers import AysSchedules

from tomesd_plus import tomesd
from tomesd_plus.dispatch import merging_report, token_merging
from tomesd_plus.evaluation.errors import EvaluationError, optional_import
from tomesd_plus.merging.config import FullSteps, ToMeConfig
from tomesd_plus.merging.report import TokenMergingReport
from tomesd_plus.presets import preset, preset_from
from tomesd_plus.schedules import AdaptiveRatio, Direction, StepPlan, schedule_by_name

TOMESD_PACKAGE = "tomesd package"
AYS_STEPS = len(AysSchedules["StableDiffusionTimesteps"])


@dataclass(frozen=True)
class Switch:
    """A method with its options, ready to be switched on.

    Args:
        on: Takes a pipeline; returns a context manager that switches the method on and may yield a report.
        resolved: All options, defaults included, so that the record stays valid when defaults change.
        depends_on_batch: It decides for a batch as a whole, so an image depends on the others in its batch.
        depends_on_timing: It decides by measured times, so images are not reproducible.
    """

    on: Callable[[Any], AbstractContextManager[Any]]
    resolved: Any
    depends_on_batch: bool = False
    depends_on_timing: bool = False


def prepare(name: str, kind: str, options: dict[str, Any]) -> Switch:
    """Make a switch by its key in :data:`SWITCHES`; errors are EvaluationErrors that name the configuration."""
    if kind not in SWITCHES:
        raise EvaluationError(f"{name}: unknown switch {kind!r}: choose from {', '.join(SWITCHES)}, name, steps")
    try:
        return SWITCHES[kind][0](**options)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{name}: {kind}: {error}".replace("ToMeConfig.__init__() ", "")) from error


def _merge(schedule: str | None = None, more_at: str = Direction.noisy, **options: Any) -> Switch:
    """Token merging by this package.

    Numbers as ratios are means of the schedule of that name; a single one of a cosine, unless another is named.
    ``{similarity: …}`` is an adaptive ratio, ``{every: …, ratio: …}`` are full steps.
    """
    if isinstance(gate := options.get("gate"), bool):  # to YAML the words on and off are truth values
        options["gate"] = "on" if gate else "off"
    if isinstance(options.get("ratio", 0.5), (int, float)):
        options, schedule = {"ratio": 0.5} | options, schedule or "cosine"
    if schedule is None and more_at != Direction.noisy:
        raise ValueError("more_at needs a schedule by name, or a number as ratio")
    maximum = ToMeConfig(cell_size=options.get("cell_size", (2, 2))).max_ratio

    def as_ratio(value: Any) -> Any:
        if isinstance(value, Mapping):
            adaptive = "similarity" in value
            return AdaptiveRatio(**value) if adaptive else {level: as_ratio(each) for level, each in value.items()}
        too_much = isinstance(value, (int, float)) and value > maximum  # which ToMeConfig says best
        if value is None or schedule is None or too_much:
            return value
        return schedule_by_name(schedule, value, more_at, maximum)

    if isinstance(full := options.get("full_steps"), Mapping):
        options["full_steps"] = FullSteps(**{n: as_ratio(each) if n == "ratio" else each for n, each in full.items()})
    options |= {name: as_ratio(options[name]) for name in ("ratio", "cached_ratio") if name in options}
    config = ToMeConfig(**options)
    kinds = config.schedules, config.cached_schedules, config.full_schedules
    adaptive = any(isinstance(chosen, AdaptiveRatio) for kind in kinds for chosen in kind.values())
    return Switch(lambda pipe: token_merging(pipe, config), config, adaptive, config.gate != "off")


def _cache(**options: Any) -> Switch:
    """The feature cache of this package."""
    from tomesd_plus.caching import FeatureCacheConfig, feature_cache

    if isinstance(plan := options.get("plan"), Mapping):
        options["plan"] = StepPlan(**plan)
    config = FeatureCacheConfig(**options)
    return Switch(lambda pipe: feature_cache(pipe, config), config, config.threshold is not None)


def _tomesd(**options: Any) -> Switch:
    """Token merging with tomesd's algorithm, from this package."""
    bound = inspect.signature(tomesd.apply_patch).bind(None, **options)
    bound.apply_defaults()
    resolved = dict(list(bound.arguments.items())[1:])  # without the model
    ratio = resolved["ratio"]
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ValueError(f"a ratio must be a number in [0, 1), not {ratio!r}")
    return Switch(lambda pipe: tomesd_patch(pipe, **options), resolved)


@contextmanager
def tomesd_patch(pipe: Any, **options: Any) -> Iterator[TokenMergingReport]:
    """Apply ``tomesd.apply_patch`` inside a ``with`` block; takes its options and yields a report."""
    tomesd.apply_patch(pipe, **options)
    try:
        yield merging_report(pipe)
    finally:
        tomesd.remove_patch(pipe)


def _tomesd_package(ratio: float = 0.5, max_downsample: int = 1) -> Switch:
    """The original package tomesd, if it is installed; on a CPU its images equal those of this package's drop-in."""
    package = optional_import("tomesd", f"the configuration {TOMESD_PACKAGE!r}")
    resolved = _tomesd(ratio=ratio, max_downsample=max_downsample).resolved

    @contextmanager
    def switch_on(pipe: Any) -> Iterator[None]:
        package.apply_patch(pipe.unet, ratio=ratio, max_downsample=max_downsample)
        try:
            yield
        finally:
            package.remove_patch(pipe.unet)

    return Switch(switch_on, resolved | {"version": version("tomesd")})


def _deepcache(interval: int = 3, branch: int = 0) -> Switch:
    """The package DeepCache, if it is installed."""
    deepcache = optional_import("DeepCache", "the configuration 'deepcache'")
    for name, value, least in (("interval", interval, 1), ("branch", branch, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")

    @contextmanager
    def switch_on(pipe: Any) -> Iterator[None]:
        helper = deepcache.DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        try:
            yield
        finally:
            helper.disable()

    return Switch(switch_on, {"interval": interval, "branch": branch, "version": version("DeepCache")})


def _preset(name: str = "balanced", force: bool = True) -> Switch:
    """One of this package's presets, or a preset's file; by default also where it is refused, to be compared there."""
    chosen = preset_from(name)

    @contextmanager
    def switch_on(pipe: Any) -> Iterator[TokenMergingReport | None]:
        with preset(pipe, chosen if force else name) as reports:
            yield reports.merging

    # the level at which it merges depends on the model, which the manifest records too
    return Switch(switch_on, {"merge": chosen.merging, "inside": chosen.merging_inside, "cache": chosen.cache})


def _ays() -> Switch:
    """The ten steps of Align Your Steps (https://arxiv.org/abs/2404.14507); set ``steps: 10`` beside it."""
    return Switch(ays_timesteps, {})


def takes_timesteps(pipe: Any) -> bool:
    """True if a pipeline's scheduler takes timesteps of one's own."""
    return "timesteps" in inspect.signature(pipe.scheduler.set_timesteps).parameters


@contextmanager
def ays_timesteps(pipe: Any) -> Iterator[None]:
    """Let a pipeline's scheduler have the first timesteps of Align Your Steps inside a ``with`` block: up to ten."""
    if not takes_timesteps(pipe):
        raise EvaluationError(f"{type(pipe.scheduler).__name__} takes no timesteps: Align Your Steps needs them")
    scheduler, family = pipe.scheduler, "XL" if getattr(pipe, "text_encoder_2", None) is not None else ""
    timesteps = AysSchedules[f"StableDiffusion{family}Timesteps"]
    inner = scheduler.set_timesteps

    def set_timesteps(steps: int, device: Any = None) -> None:
        if steps > len(timesteps):
            raise EvaluationError(f"Align Your Steps has {len(timesteps)} steps, not {steps}: set steps beside it")
        inner(timesteps=timesteps[:steps], device=device)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps


SWITCHES: dict[str, tuple[Callable[..., Switch], str]] = {
    "merge": (_merge, "ratio"),
    "cache": (_cache, "interval"),
    "tomesd": (_tomesd, "ratio"),
    TOMESD_PACKAGE: (_tomesd_package, "ratio"),
    "deepcache": (_deepcache, "interval"),
    "preset": (_preset, "name"),
    "ays": (_ays, ""),
}
"""By key: the function that takes the options, and the main option, which a single value sets."""
