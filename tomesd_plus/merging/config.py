"""Every choice of token merging, in one validated object."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from tomesd_plus.matching import MergeMode
from tomesd_plus.schedules import AdaptiveRatio, ConstantSchedule, CosineSchedule, Schedule
from tomesd_plus.schedules.checks import is_whole

Ratio = float | Schedule | AdaptiveRatio
Ratios = Ratio | Mapping[int, Ratio]
Layer = Literal["self_attention", "cross_attention", "mlp"]
Sides = Literal["both", "keys_values", "queries"]
Metric = Literal["attention_input", "block_input", "keys"]
Destinations = Literal["random", "fixed"]
PlanPer = Literal["block", "stage", "level"]
GateMode = Literal["off", "on", "remeasure"]
BlocksPerRun = int | Literal["all"]
Cache = Literal["cache"]

LEVELS = (1, 2, 4, 8)
LAYERS: tuple[Layer, ...] = ("self_attention", "cross_attention", "mlp")
CHOICES: dict[str, tuple[Any, ...]] = {
    "max_downsample": LEVELS,
    "gate": ("off", "on", "remeasure"),
    "destinations": ("random", "fixed"),
    "metric": ("attention_input", "block_input", "keys"),
    "mode": ("merge", "prune"),
    "sides": ("both", "keys_values", "queries"),
    "plan_per": ("block", "stage", "level"),
}
WHOLE_NUMBERS: Any = {"seed": (0,), "window": (1, None), "plan_every": (1, "cache"), "blocks_per_run": (1, "all")}
"""The least that is allowed, and what else is."""


@dataclass(frozen=True)
class FullSteps:
    """Steps on which the layers that merge run on all tokens; on the others each token keeps its offset from then.

    Pictures become much closer for little less saved. Each merged layer keeps one output in memory.

    Args:
        every: A full step every so many steps, at least 2, a generation's first among them: rarer is faster, and less
            close. ``"cache"``: the full steps of a feature cache, so that only its cached steps merge; models without
            such a cache, ControlNets too, then have no full steps.
        ratio: With ``every="cache"``: the ratio at which self-attention merges on full steps too, in the layers that
            cached steps skip; those that run on cached steps stay full, for the sake of their offsets. A ratio, or a
            mapping from level, as in :class:`ToMeConfig`. ``None``: none merge on full steps, as inside
            ``torch.compile``'s graphs.

    Raises:
        ValueError: A value is outside its range, or there is a ratio without a cache.
    """

    every: int | Cache
    ratio: Ratios | None = None

    def __post_init__(self) -> None:
        if self.every != "cache" and not is_whole(self.every, 2):
            raise ValueError(f"full_steps must be 'cache' or a whole number of at least 2, not {self.every!r}")
        if self.ratio is not None and self.every != "cache":
            raise ValueError("a ratio on full steps needs every='cache': other full steps skip no layers")


@dataclass(frozen=True)
class ToMeConfig:
    """What to merge, where, and how much.

    Args:
        ratio: Share of tokens to remove, of all tokens at a level, in [0, 1): a number, a schedule from noise level to
            ratio, an :class:`AdaptiveRatio`, or a mapping from level (downsample 1, 2, 4 or 8) to any of them. A
            mapping decides by itself which levels are merged. Default: a cosine schedule that merges more at noisy
            steps, with a mean of 0.5. More is faster and less close. A cell of ``a × b`` tokens keeps one
            destination, so no ratio may exceed 1 − 1/(a·b): 0.75 with the default cells.
        cached_ratio: In place of ``ratio`` on the cached steps of a feature cache, where the few layers that still run
            are most of the cost. Default: the same. Does nothing without
            :func:`~tomesd_plus.apply_feature_cache`.
        max_downsample: Merge at levels of at most this downsample: 1 (default), 2, 4 or 8. SD 1.x and 2.x have most
            of their cost at 1; **SDXL has no attention at 1, set 2 there.** Ignored if a ratio is a mapping.
        gate: ``"off"`` (default) merges at every level. ``"on"`` leaves those alone at which merging does not pay at
            the size, batch, dtype and device at hand: each kind of block is measured once, both ways, and the result
            is kept in the user's cache folder. An adaptive ratio is measured at its smallest. ``"remeasure"``: the
            same, measured anew. Inside ``torch.compile``'s graphs nothing can be measured: there all levels merge.
        cell_size: Height and width of the cells, in tokens, that hold one destination each; (2, 2) by default. Larger
            cells allow higher ratios.
        window: Side of the windows, in cells, inside which a source looks for its destination; 8 by default. 1 is its
            own cell, ``None`` the whole picture. Small windows make matching cheap and its memory small.
        destinations: ``"random"`` (default) draws each cell's destination anew at every step, from a generator seeded
            by ``seed`` and the noise level, so the same call gives the same image. ``"fixed"`` takes its first token.
        metric: What cosine similarity is measured on: ``"attention_input"`` (default, after the block's norm),
            ``"block_input"`` (before it, as tomesd does, and always with ``layers="block"``) or ``"keys"`` (the mean
            over heads of the attention's keys, as ToMe for vision transformers does,
            https://arxiv.org/abs/2210.09461).
        layers: Which layers of a transformer block run on merged tokens, all by one plan: any of
            ``"self_attention"`` (default), ``"cross_attention"`` and ``"mlp"``. More layers save more; the MLP costs
            most quality. ``"block"``: merge once where a block begins and add what it changed back to every token
            where it ends: all its layers, for one merge and one unmerge. Stable Diffusion 3 and Flux attend to text
            in ``"self_attention"``, and have no ``"cross_attention"``.
        blocks_per_run: With ``layers="block"`` in a transformer: merge once before so many consecutive blocks, and add
            what they have changed back to every token after the last; 1 by default. ``"all"``: from the first block to
            the last. Longer runs save more, and tokens of a group stay alike for longer.
        sides: Which side of self-attention is merged: ``"both"`` (default); ``"keys_values"`` keeps every query, which
            keeps more detail and saves less. With ``window=1``, fixed destinations, pruning and a ratio of 0.75 this
            is ToDo's downsampling (https://arxiv.org/abs/2402.13573); with merging instead of pruning, average
            pooling. ``"queries"`` keeps all keys and values.
        mode: ``"merge"`` (default) averages tokens, ``"prune"`` drops all but the destination.
        proportional_attention: Let a merged key that stands for s tokens weigh s times, by adding log s to its
            logits (https://arxiv.org/abs/2210.09461). On by default: it is what keeps pictures close.
        plan_per: Who makes a plan of its own: each ``"block"``; the first block of each ``"stage"`` (default: the down
            block, mid block or up block of the UNet), for all of them; or the first of each ``"level"``. Sharing
            saves matchings, but what is alike in the first block need not be in the last. Compiled layers make plans
            of their own at every step, unless it is ``"level"``.
        plan_every: For how many steps a plan is used, at least 1 (default); calls at one timestep are one step.
            ``"cache"``: plans of a feature cache's full step serve its cached steps too, where the ratio is the same.
        full_steps: A number, ``"cache"`` or a :class:`FullSteps`: steps on which merged layers run on all tokens, so
            that on the others each token keeps its offset from its group's mean. Default: none.
        seed: Seed of the random destinations, at least 0 (default).

    Raises:
        ValueError: A value is outside its range. The message names it and says what is allowed.
    """

    ratio: Ratios | None = None
    cached_ratio: Ratios | None = None
    max_downsample: int = 1
    gate: GateMode = "off"
    cell_size: tuple[int, int] = (2, 2)
    window: int | None = 8
    destinations: Destinations = "random"
    metric: Metric = "attention_input"
    layers: Sequence[Layer] | Literal["block"] = ("self_attention",)
    blocks_per_run: BlocksPerRun = 1
    sides: Sides = "both"
    mode: MergeMode = "merge"
    proportional_attention: bool = True
    plan_per: PlanPer = "stage"
    plan_every: int | Cache = 1
    full_steps: FullSteps | int | Cache | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._normalize()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {getattr(self, name)!r}")
        if self.layers != "block" and not (self.layers and set(self.layers) <= set(LAYERS)):
            raise ValueError(
                f"layers must be 'block', or one or more of {', '.join(map(repr, LAYERS))}, not {self.layers!r}"
            )
        sides = self.cell_size if isinstance(self.cell_size, tuple) else ()
        if len(sides) != 2 or not all(is_whole(side, 1) for side in sides):
            raise ValueError(f"cell_size must be two whole numbers of at least 1, not {self.cell_size!r}")
        if not isinstance(self.proportional_attention, bool):
            raise ValueError(f"proportional_attention must be True or False, not {self.proportional_attention!r}")
        for name, (least, *others) in WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value not in others and not is_whole(value, least):
                choices = "".join(f"{other!r} or " for other in others)
                raise ValueError(f"{name} must be {choices}a whole number of at least {least}, not {value!r}")
        for name, ratio in self._ratios().items():
            if isinstance(ratio, Mapping) and (not ratio or not set(ratio) <= set(LEVELS)):
                raise ValueError(f"{name} must map levels among {LEVELS} to ratios, not {ratio!r}")
            for each in ratio.values() if isinstance(ratio, Mapping) else [ratio]:
                self._check_maximum(_as_schedule(each))
        self._check_combinations()

    def _normalize(self) -> None:
        """Bring what may be written in several ways to one."""
        forms: dict[str, Any] = {}
        if self.ratio is None:
            forms["ratio"] = CosineSchedule()
        if isinstance(self.cell_size, list):
            forms["cell_size"] = tuple(self.cell_size)
        if self.layers != "block":
            named = (self.layers,) if isinstance(self.layers, str) else self.layers
            known = tuple(layer for layer in LAYERS if layer in named) if isinstance(named, Sequence) else ()
            forms["layers"] = known if isinstance(named, Sequence) and set(named) <= set(LAYERS) else named
        if self.full_steps is not None and not isinstance(self.full_steps, FullSteps):
            forms["full_steps"] = FullSteps(self.full_steps)
        for name, value in forms.items():
            object.__setattr__(self, name, value)

    def _check_combinations(self) -> None:
        if self.blocks_per_run != 1 and (self.layers != "block" or self.gate != "off"):
            raise ValueError(
                f"blocks_per_run={self.blocks_per_run!r} needs layers='block', and goes without a gate, which "
                "measures single blocks"
            )
        if self.sides != "both" and "self_attention" not in self.layers:
            raise ValueError(f"sides={self.sides!r} is of self-attention: it needs layers with 'self_attention'")
        if self.sides == "keys_values" and self.full_steps is not None:
            raise ValueError("sides='keys_values' keeps every query, so there is no detail for full_steps to keep")
        if self.layers == "block":
            if self.metric == "keys":
                raise ValueError("layers='block' measures similarity on the block's input: metric='keys' is no choice")
            object.__setattr__(self, "metric", "block_input")
        if self.full_schedules and ("self_attention" not in self.layers or self.gate != "off"):
            raise ValueError("a ratio on full steps needs layers with 'self_attention', and goes without a gate")

    @property
    def schedules(self) -> dict[int, Schedule | AdaptiveRatio]:
        """The schedule of each level that is merged."""
        return self._by_level(self.ratio)

    @property
    def cached_schedules(self) -> dict[int, Schedule | AdaptiveRatio]:
        """The same on a feature cache's cached steps."""
        return self._by_level(self.ratio if self.cached_ratio is None else self.cached_ratio)

    @property
    def full_schedules(self) -> dict[int, Schedule | AdaptiveRatio]:
        """The same on full steps; empty if nothing merges there."""
        ratio = self.full_steps.ratio if isinstance(self.full_steps, FullSteps) else None
        return {} if ratio is None else self._by_level(ratio)

    @property
    def follows_noise_level(self) -> bool:
        """True if a ratio depends on the noise level."""
        all_of_them = [*self.schedules.values(), *self.cached_schedules.values(), *self.full_schedules.values()]
        return any(not isinstance(each, ConstantSchedule | AdaptiveRatio) for each in all_of_them)

    @property
    def full_every(self) -> int | Cache | None:
        """``full_steps``' cadence."""
        return self.full_steps.every if isinstance(self.full_steps, FullSteps) else None

    @property
    def of_cached_steps(self) -> tuple[str, ...]:
        """The options, by name, that do something on a feature cache's cached steps only."""
        asked = {
            'full_steps="cache"': self.full_every == "cache",
            "cached_ratio": self.cached_ratio is not None,
            'plan_every="cache"': self.plan_every == "cache",
        }
        return tuple(name for name, is_asked in asked.items() if is_asked)

    @property
    def max_ratio(self) -> float:
        """What the cells allow: each keeps one token."""
        return 1 - 1 / math.prod(self.cell_size)

    def _ratios(self) -> dict[str, Ratios]:
        full = self.full_steps.ratio if isinstance(self.full_steps, FullSteps) else None
        ratios = {"ratio": self.ratio, "cached_ratio": self.cached_ratio, "full_steps' ratio": full}
        return {name: ratio for name, ratio in ratios.items() if ratio is not None}

    def _by_level(self, ratio: Ratios | None) -> dict[int, Schedule | AdaptiveRatio]:
        by_level = ratio if isinstance(ratio, Mapping) else dict.fromkeys(LEVELS, cast(Ratio, ratio))
        return {
            level: _as_schedule(each)
            for level, each in sorted(by_level.items())
            if isinstance(ratio, Mapping) or level <= self.max_downsample
        }

    def _check_maximum(self, schedule: Schedule | AdaptiveRatio) -> None:
        if max(schedule.ratios) > self.max_ratio + 1e-9:
            height, width = self.cell_size
            raise ValueError(
                f"a ratio of {max(schedule.ratios):g} is more than cells of {height} × {width} tokens allow "
                f"({self.max_ratio:g}): each keeps one destination. Lower the ratio, or set a larger cell_size."
            )


def _as_schedule(ratio: Ratio) -> Schedule | AdaptiveRatio:
    return ratio if isinstance(ratio, (Schedule, AdaptiveRatio)) else ConstantSchedule(ratio)
