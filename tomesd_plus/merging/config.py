"""Every choice of token merging, in one validated object."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from tomesd_plus.matching import MergeMode
from tomesd_plus.schedules import (
    AdaptiveRatio,
    ConstantSchedule,
    CosineSchedule,
    Direction,
    Schedule,
    schedule_by_name,
)

Ratio = float | Schedule | AdaptiveRatio
Metric = Literal["attention_input", "block_input", "keys"]
Destinations = Literal["random", "fixed"]
PlanPer = Literal["block", "stage", "level"]
Levels = Literal["all", "auto", "remeasure"]
Full = Literal["full"]

LEVELS = (1, 2, 4, 8)


@dataclass(frozen=True)
class ToMeConfig:
    """What to merge, where, and how much.

    Args:
        ratio: Share of tokens to remove, of all tokens at a level, in [0, 1): a number, a schedule from noise level to
            ratio, an :class:`AdaptiveRatio`, or a mapping from level (downsample 1, 2, 4 or 8) to any of them. A
            mapping decides by itself which levels are merged. ``None``: step-aware, with a mean of 0.5. A cell of
            ``a × b`` tokens keeps one destination, so no ratio may exceed 1 − 1/(a·b): 0.75 with the default cells.
        schedule: How a number given as one of the ratios goes over the noise levels, which is then its mean:
            ``"constant"``, ``"linear"``, ``"cosine"``, ``"steps"``, or ``"auto"``, the best of these as measured.
            ``None``: constant for a number, and a cosine where no ratio is given.
        more_at: ``"noisy"`` or ``"clean"``: where that schedule merges more; ``"auto"`` decides it itself. Both fields
            end up in the ratios, which are schedules then.
        cached_ratio: In place of ``ratio`` on the cached steps of a feature cache, where the few layers that still run
            are most of the cost; ``None``: the same. Does nothing without :func:`~tomesd_plus.apply_feature_cache`.
        skipped_ratio: With ``whole_every="full"``: the ratio at which self-attention merges on a cache's full steps in
            the layers that its cached steps skip. Those that run on cached steps too stay whole there, for the sake of
            their details. ``None``: all stay whole, as they do inside ``torch.compile``'s graphs.
        max_downsample: Merge at levels of at most this downsample: 1, 2, 4 or 8. SD 1.x and 2.x have most of their
            cost at 1; **SDXL has no attention at 1, set 2 there.** Ignored if ``ratio`` is a mapping.
        levels: ``"all"`` merges at every level within ``max_downsample``. ``"auto"`` leaves those alone at which
            merging does not pay at the size, batch, dtype and device at hand: each kind of block is measured once,
            both ways, and the result is kept in the user's cache folder. An adaptive ratio is measured at its
            smallest. ``"remeasure"``: the same, measured anew. Inside ``torch.compile``'s graphs nothing can be
            measured: there all levels are merged.
        cell_size: Height and width of the cells, in tokens, that hold one destination each. Larger cells allow higher
            ratios.
        window: Side of the windows, in cells, inside which a source looks for its destination; 1 is its own cell, and
            ``None`` the whole picture. Small windows make matching cheap and its memory small.
        destinations: ``"random"`` draws each cell's destination anew at every step, from a generator seeded by
            ``seed`` and the noise level, so the same call gives the same image. ``"fixed"`` takes its first token.
        metric: What cosine similarity is measured on: ``"attention_input"`` (after the block's norm),
            ``"block_input"`` (before it, as tomesd does) or ``"keys"`` (the mean over heads of the attention's keys,
            as ToMe for vision transformers does, https://arxiv.org/abs/2210.09461).
        merge_self_attention: Merge around self-attention.
        merge_cross_attention: Merge around cross-attention too, by the same plan.
        merge_mlp: Merge around the feed-forward layer too, by the same plan. Costs more quality than the others.
        merge_block: Merge once where a transformer block begins and add what the block changed back to every token
            where it ends: all its layers run on the merged tokens, for one merge and one unmerge. Similarity is then
            measured on the block's input.
        mode: ``"merge"`` averages tokens, ``"prune"`` drops all but the destination.
        keys_values_only: Keep every query and merge only the keys and values: keeps more detail, saves less. With
            ``window=1``, fixed destinations, pruning and a ratio of 0.75 this is ToDo's downsampling
            (https://arxiv.org/abs/2402.13573); with merging instead of pruning, average pooling.
        queries_only: Keep all keys and values and merge only the queries.
        proportional_attention: Let a merged key that stands for s tokens weigh s times, by adding log s to its
            logits (https://arxiv.org/abs/2210.09461, "proportional attention"). It is what keeps pictures close.
        plan_per: Who makes a plan of its own: each ``"block"``; the first block of each ``"stage"`` (the down block,
            mid block or up block of the UNet), for all of them; or the first of each ``"level"``. Sharing saves
            matchings, but what is alike in the first block need not be in the last. Compiled layers make plans of
            their own at every step, unless it is ``"level"``.
        plan_every: For how many steps a plan is used, at least 1; calls at one timestep are one step. ``"full"``:
            plans of a feature cache's full step serve its cached steps too, where the ratio is the same.
        whole_every: Run the merged layers on all tokens every so many steps, at least 2, beginning with the first, and
            let each token keep on the steps between what told it from its group then: much closer pictures for little
            less saved. Keeps one output of each merged layer in memory, and in copies of the model. ``"full"``: on the
            full steps of a feature cache, so that only its cached steps merge (and what ``skipped_ratio`` adds);
            models without such a cache, ControlNets too, then have no whole steps. ``None``: never.
        reuse_attention: On the steps between whole ones do not merge, but take each self-attention's output of the
            last whole step again, wherever the ratio is not 0 (pyramid attention broadcast,
            https://arxiv.org/abs/2408.12588).
        seed: Seed of the random destinations, at least 0.

    Raises:
        ValueError: A value is outside its range. The message names it and says what is allowed.
    """

    ratio: Ratio | Mapping[int, Ratio] | None = None
    schedule: str | None = None
    more_at: str = Direction.noisy
    cached_ratio: Ratio | Mapping[int, Ratio] | None = None
    skipped_ratio: Ratio | Mapping[int, Ratio] | None = None
    max_downsample: int = 1
    levels: Levels = "all"
    cell_size: tuple[int, int] = (2, 2)
    window: int | None = 8
    destinations: Destinations = "random"
    metric: Metric = "attention_input"
    merge_self_attention: bool = True
    merge_cross_attention: bool = False
    merge_mlp: bool = False
    merge_block: bool = False
    mode: MergeMode = "merge"
    keys_values_only: bool = False
    queries_only: bool = False
    proportional_attention: bool = True
    plan_per: PlanPer = "stage"
    plan_every: int | Full = 1
    whole_every: int | Full | None = None
    reuse_attention: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.more_at not in list(Direction):
            raise ValueError(f"more_at must be 'noisy' or 'clean', not {self.more_at!r}")
        if self.ratio is None:
            default = CosineSchedule() if self.more_at == Direction.noisy else CosineSchedule().reversed()
            object.__setattr__(self, "ratio", default if self.schedule is None else 0.5)
        elif self.schedule is None and self.more_at != Direction.noisy:
            raise ValueError("more_at needs a schedule by name, or no ratio at all")
        if isinstance(self.cell_size, list):
            object.__setattr__(self, "cell_size", tuple(self.cell_size))
        for name, allowed in {
            "destinations": ("random", "fixed"),
            "metric": ("attention_input", "block_input", "keys"),
            "mode": ("merge", "prune"),
            "plan_per": ("block", "stage", "level"),
            "levels": ("all", "auto", "remeasure"),
            "max_downsample": LEVELS,
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {getattr(self, name)!r}")
        sides = self.cell_size if isinstance(self.cell_size, tuple) else ()
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise ValueError(f"cell_size must be two whole numbers of at least 1, not {self.cell_size!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, not {self.seed!r}")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f"window must be None or a whole number of at least 1, not {self.window!r}")
        if self.plan_every != "full" and (not isinstance(self.plan_every, int) or self.plan_every < 1):
            raise ValueError(f"plan_every must be 'full' or a whole number of at least 1, not {self.plan_every!r}")
        if self.whole_every not in (None, "full") and (not isinstance(self.whole_every, int) or self.whole_every < 2):
            raise ValueError(
                f"whole_every must be None, 'full' or a whole number of at least 2, not {self.whole_every!r}"
            )
        if self.whole_every is not None and self.keys_values_only:
            raise ValueError("keys_values_only keeps every query, so there is no detail for whole_every to keep")
        if not (self.merge_self_attention or self.merge_cross_attention or self.merge_mlp or self.merge_block):
            raise ValueError("nothing to merge: self-attention, cross-attention and MLP are all switched off")
        if self.keys_values_only + self.queries_only + self.merge_block > 1:
            raise ValueError("of keys_values_only, queries_only and merge_block only one can be on")
        for name in ("keys_values_only", "queries_only"):
            if getattr(self, name) and not self.merge_self_attention:
                raise ValueError(f"{name} needs merge_self_attention")
        if self.merge_block:
            if not self.merge_self_attention or self.merge_cross_attention or self.merge_mlp:
                raise ValueError("merge_block merges all layers of a block: leave the other merge_… options alone")
            if self.metric == "keys":
                raise ValueError("merge_block measures similarity on the block's input; metric='keys' cannot be had")
            object.__setattr__(self, "metric", "block_input")
        if self.reuse_attention:
            others = (self.merge_cross_attention, self.merge_mlp, self.merge_block, self.queries_only)
            fitting = self.levels == "all" and self.metric == "attention_input" and self.merge_self_attention
            if self.whole_every is None or any(others) or not fitting:
                raise ValueError(
                    "reuse_attention needs whole_every, and goes without merge_cross_attention, merge_mlp, "
                    "merge_block, queries_only, a gate (levels) and another metric: nothing is merged"
                )
        if self.skipped_ratio is not None:
            fitting = self.levels == "all" and self.merge_self_attention and not self.merge_block
            if self.whole_every != "full" or self.reuse_attention or not fitting:
                raise ValueError(
                    "skipped_ratio needs whole_every='full' and merge_self_attention, and goes without merge_block, "
                    "reuse_attention and a gate (levels)"
                )
        for name in ("ratio", "cached_ratio", "skipped_ratio"):
            ratio = getattr(self, name)
            if isinstance(ratio, Mapping) and (not ratio or not set(ratio) <= set(LEVELS)):
                raise ValueError(f"{name} must map levels among {LEVELS} to ratios, not {ratio!r}")
            if ratio is not None:
                object.__setattr__(self, name, self._with_schedule(ratio))
        object.__setattr__(self, "schedule", None)  # it is in the ratios now
        object.__setattr__(self, "more_at", Direction.noisy)
        for schedule in (*self.schedules.values(), *self.cached_schedules.values(), *self.skipped_schedules.values()):
            self._check_maximum(schedule)

    @property
    def schedules(self) -> dict[int, Schedule | AdaptiveRatio]:
        """The schedule of each level that is merged."""
        return self._by_level(self.ratio)

    @property
    def cached_schedules(self) -> dict[int, Schedule | AdaptiveRatio]:
        """The same on a feature cache's cached steps."""
        return self._by_level(self.ratio if self.cached_ratio is None else self.cached_ratio)

    @property
    def skipped_schedules(self) -> dict[int, Schedule | AdaptiveRatio]:
        """The same on its full steps, of the layers that its cached steps skip; empty if these are whole too."""
        return {} if self.skipped_ratio is None else self._by_level(self.skipped_ratio)

    def _by_level(self, ratio: Ratio | Mapping[int, Ratio] | None) -> dict[int, Schedule | AdaptiveRatio]:
        by_level = ratio if isinstance(ratio, Mapping) else dict.fromkeys(LEVELS, ratio)
        return {
            level: each if isinstance(each, (Schedule, AdaptiveRatio)) else ConstantSchedule(cast(float, each))
            for level, each in sorted(by_level.items())
            if isinstance(ratio, Mapping) or level <= self.max_downsample
        }

    def _with_schedule(self, ratio: Ratio | Mapping[int, Ratio]) -> Ratio | Mapping[int, Ratio]:
        """A ratio, or a mapping of them, with the schedule by name in the place of each number."""
        if isinstance(ratio, Mapping):
            return {level: cast(Ratio, self._with_schedule(each)) for level, each in ratio.items()}
        if isinstance(ratio, (Schedule, AdaptiveRatio)):
            if self.schedule is not None:
                raise ValueError("schedule needs the ratios to be numbers, which become its means")
            return ratio
        self._check_maximum(ConstantSchedule(ratio))
        if self.schedule is None:
            return ratio
        return schedule_by_name(self.schedule, ratio, self.more_at, self.max_ratio)

    @property
    def max_ratio(self) -> float:
        """What the cells allow: each keeps one token."""
        return 1 - 1 / math.prod(self.cell_size)

    def _check_maximum(self, schedule: Schedule | AdaptiveRatio) -> None:
        if max(schedule.ratios) > self.max_ratio + 1e-9:
            height, width = self.cell_size
            raise ValueError(
                f"a ratio of {max(schedule.ratios):g} is more than cells of {height} × {width} tokens allow "
                f"({self.max_ratio:g}): each keeps one destination. Lower the ratio, or set a larger cell_size."
            )
