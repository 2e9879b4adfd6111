"""The settings that a benchmark compares: ways of merging, their ideals, other packages, and the untouched UNet."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from math import lcm
from typing import Any

from diffusers import PixArtTransformer2DModel

from tomesd_plus.benchmark.ideal import fewer_tokens
from tomesd_plus.benchmark.ideal_transformers import fewer_image_tokens
from tomesd_plus.evaluation.configurations import Configuration, parse_configuration
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.switches import TOMESD_PACKAGE
from tomesd_plus.host.models import unwrapped
from tomesd_plus.merging.config import LAYERS, ToMeConfig
from tomesd_plus.presets import PRESETS

STEPS = 25  # of one generation
IDEAL = "ideal: "
PACKAGE = TOMESD_PACKAGE
INTERVALS = (2, 3, 4, 5, 7)  # of feature caches
FEW_INTERVALS = (2, 3, 5)
OF_IDEAL = ("layers", "blocks_per_run", "sides", "cell_size")
"""The options that determine which layers run on how many tokens, and with it the ideal."""

_ALL_LAYERS: dict[str, Any] = {"layers": list(LAYERS)}
_BLOCK = {"layers": "block"}
_PRESETS = _ALL_LAYERS | {"full_steps": "cache", "plan_per": "block"}
NAMED: dict[str, dict[str, dict[str, Any]]] = {
    "attn1": {"merge": {}},
    "attn1, gate": {"merge": {"gate": "remeasure"}},  # ignores the decisions of earlier runs
    "attn1, plan per block": {"merge": {"plan_per": "block"}},
    "attn1, full every 4": {"merge": {"full_steps": 4, "plan_per": "block"}},
    "attention cache 4": {"cache": {"interval": 4, "branch": "self_attention"}},
    "attn1 + attn2 + mlp": {"merge": _ALL_LAYERS},
    "block": {"merge": _BLOCK},
    "run": {"merge": _BLOCK | {"blocks_per_run": "all"}},  # transformers: merged once, unmerged once
    "block, plan every 4": {"merge": _BLOCK | {"plan_every": 4}},
    "block, full every 4": {"merge": _BLOCK | {"full_steps": 4}},
    "keys and values": {"merge": {"sides": "keys_values"}},
    "tomesd": {"tomesd": {}},
    PACKAGE: {PACKAGE: {}},
    "block + cache 3": {"merge": _BLOCK, "cache": {"interval": 3}},
    **{f"cache {interval}": {"cache": {"interval": interval}} for interval in INTERVALS},
    **{f"DeepCache {interval}": {"deepcache": {"interval": interval}} for interval in INTERVALS},
    **{f"skip {interval}": {"cache": {"interval": interval, "branch": "nothing"}} for interval in INTERVALS},
    **{f"attn1 + cache {interval}": {"merge": {}, "cache": {"interval": interval}} for interval in FEW_INTERVALS},
    **{f"preset {name}": {"preset": {"name": name}} for name in PRESETS},
    "cached steps merged + cache 5": {"merge": _PRESETS, "cache": {"interval": 5}},
    "all steps merged + cache 5": {
        "merge": _PRESETS | {"full_steps": {"every": "cache", "ratio": 0.5}},
        "cache": {"interval": 5},
    },
}
"""Settings by name; those that merge are measured at each ratio."""


@dataclass(frozen=True)
class Setting:
    """A way of running a UNet.

    Args:
        name: Shown in tables.
        switches: The methods to switch on, as in :class:`~tomesd_plus.evaluation.configurations.Configuration`; empty
            for the untouched UNet.
        ratio: Share of tokens to remove, the same at every step; ``None`` if nothing merges.
        levels: Number of levels at which to merge, starting at the finest that has self-attention.
    """

    name: str
    switches: dict[str, dict[str, Any]] = field(default_factory=dict)
    ratio: float | None = None
    levels: int = 1

    @property
    def key(self) -> tuple[str, str, str]:
        """Identifies a setting: name, ratio and levels as they stand in tables."""
        return self.name, "" if self.ratio is None else f"{self.ratio:g}", str(self.levels)

    @property
    def ideal(self) -> "Setting | None":
        """The same layers on as few tokens without overhead; ``None`` if the setting does more than merging."""
        if len(self.switches) != 1:
            return None
        [(kind, options)] = self.switches.items()
        if kind != "merge" and (kind not in ("tomesd", PACKAGE) or options):
            return None
        layers = {name: options[name] for name in OF_IDEAL if name in options}
        return Setting(IDEAL + _layers(layers), {"ideal": layers}, self.ratio, self.levels)

    @property
    def cycle(self) -> int:
        """The number of UNet calls after which its work repeats: with presets, plans and forecasts a generation's."""
        cache = self.switches.get("cache", {})
        if "preset" in self.switches or cache.get("forecast") or cache.get("plan"):
            return STEPS
        merge = self.switches.get("merge", {})
        caches = [options for kind, options in self.switches.items() if kind in ("cache", "deepcache")]
        counts = [merge.get("full_steps"), merge.get("plan_every"), *(each.get("interval", 3) for each in caches)]
        # values that are not integers follow the cache
        return min(lcm(*(count for count in counts if isinstance(count, int))), STEPS)

    def check(self) -> None:
        """Raise an EvaluationError if an option is wrong or a package is not installed."""
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise EvaluationError(f"{self.name}: a ratio must lie in [0, 1), not {self.ratio:g}")
        self.configuration()

    @property
    def note(self) -> str:
        """The versions of other packages that it uses."""
        packages = {PACKAGE: "tomesd", "deepcache": "DeepCache"}
        return ", ".join(f"{packages[kind]} {version(packages[kind])}" for kind in self.switches if kind in packages)

    @contextmanager
    def switched_on(self, pipe: Any, finest: int = 1, latent_size: tuple[int, int] | None = None) -> Iterator[Any]:
        """Apply the setting to a pipeline inside a ``with`` block; yields the report of merging, if any.

        Args:
            pipe: A pipeline, or an object with a UNet and a scheduler.
            finest: The smallest downsample at which the UNet has self-attention.
            latent_size: Height and width of the latents, or of a transformer's grid of tokens; required by ideals.
        """
        if "ideal" in self.switches:
            assert latent_size is not None
            layers = self.switches["ideal"]
            config = ToMeConfig(self.ratio or 0.0, max_downsample=self._max_downsample(finest), **layers)
            transformer = getattr(pipe, "transformer", None)
            on: Any = (
                fewer_tokens(pipe.unet, config, *latent_size)
                if transformer is None
                else fewer_image_tokens(transformer, config, *latent_size)
            )
        else:
            own = replace(self, switches=_without_what_is_joint(self.switches, getattr(pipe, "transformer", None)))
            on = own.configuration(finest).switched_on(pipe) if self.switches else nullcontext()
        with on as report:
            yield report

    def _max_downsample(self, finest: int) -> int:
        return int(min(8, finest * 2 ** (self.levels - 1)))

    def configuration(self, finest: int = 1) -> Configuration:
        """The setting as a configuration, for a UNet with self-attention from ``finest`` on; not for ideals."""
        merging: dict[str, Any] = {"ratio": self.ratio, "max_downsample": self._max_downsample(finest)}
        added = {"merge": {**merging, "schedule": "constant"}, "tomesd": merging, PACKAGE: merging}
        own = {kind: options for kind, options in self.switches.items() if kind != "ideal"}
        return Configuration(self.name, {kind: options | added.get(kind, {}) for kind, options in own.items()})


UNTOUCHED = Setting("untouched")


def settings_from(names: Sequence[str], ratios: Sequence[float], levels: int = 1) -> list[Setting]:
    """Make settings from names or configurations' texts; those that merge once per ratio.

    Args:
        names: Keys of :data:`NAMED`, or texts such as ``"merge: {layers: block, window: 4}"``.
        ratios: Shares of tokens to remove.
        levels: Number of levels at which to merge, starting at the finest that has self-attention.

    Example:
        >>> [setting.key for setting in settings_from(["attn1", "cache 3"], [0.25, 0.5])]
        [('attn1', '0.25', '1'), ('attn1', '0.5', '1'), ('cache 3', '', '1')]
    """
    chosen = []
    for name in names:
        if name == UNTOUCHED.name:
            continue  # always included
        if name not in NAMED and ":" not in name:
            raise EvaluationError(
                f"unknown setting {name!r}: choose from {'; '.join(NAMED)}; or a configuration's text"
            )
        switches = NAMED.get(name) or _parsed(name)
        merging = switches.keys() & {"merge", "tomesd", PACKAGE}
        own = switches.get("merge", switches.get("tomesd", {})).get("ratio")
        switches = {kind: {n: v for n, v in options.items() if n != "ratio"} for kind, options in switches.items()}
        for ratio in ([own] if own is not None else ratios) if merging else [None]:
            chosen.append(Setting(name, switches, ratio, levels if merging else 1))
    return chosen


def with_ideals(settings: Sequence[Setting]) -> list[Setting]:
    """The untouched UNet, then the settings, each after its ideal, without duplicates."""
    chosen = {UNTOUCHED.key: UNTOUCHED}
    for setting in settings:
        for each in (setting.ideal, setting):
            if each is not None:
                chosen.setdefault(each.key, each)
    return list(chosen.values())


def _parsed(text: str) -> dict[str, dict[str, Any]]:
    switches = parse_configuration(text).switches
    merge, cache = switches.get("merge", {}), switches.get("cache", {})
    if not isinstance(merge.get("ratio", 0.0), (int, float)) or merge.keys() & {"schedule", "more_at"}:
        raise EvaluationError(f"{text}: a benchmark merges at a constant ratio, which must be a number")
    if any("max_downsample" in options for options in switches.values()):
        raise EvaluationError(f"{text}: give --levels, how many levels to merge, instead of max_downsample")
    if not isinstance(cache.get("interval", 3), int) or cache.keys() & {"full_steps", "threshold"}:
        raise EvaluationError(f"{text}: a benchmark measures caches with an interval, which must be a number")
    return switches


def _layers(options: dict[str, Any]) -> str:
    """Name of the layers that run on fewer tokens."""
    config = ToMeConfig(**options)
    attention = {"both": "attn1", "keys_values": "keys and values", "queries": "queries"}[config.sides]
    words = {"self_attention": attention, "cross_attention": "attn2", "mlp": "mlp"}
    block = "block" if config.blocks_per_run == 1 else f"run of {config.blocks_per_run} blocks"
    name = block if config.layers == "block" else " + ".join(words[layer] for layer in config.layers)
    return name + (f", cells {options['cell_size']}" if "cell_size" in options else "")


def _without_what_is_joint(switches: Any, transformer: Any) -> Any:
    """Switches without cross-attention, for a transformer that attends to text in self-attention."""
    merge = switches.get("merge", {})
    joint = transformer is not None and not isinstance(unwrapped(transformer), PixArtTransformer2DModel)
    if not joint or "cross_attention" not in merge.get("layers", ()):
        return switches
    return switches | {"merge": merge | {"layers": [each for each in merge["layers"] if each != "cross_attention"]}}
