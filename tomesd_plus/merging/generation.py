"""What merging holds from a generation's first call to the next one's, and for each call of the model in it."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tomesd_plus.host.step import Step, StepTracker
from tomesd_plus.host.transient import ThreadLocal
from tomesd_plus.matching import Cells, MergePlan
from tomesd_plus.merging.answers import Answer, Leave, Merge, Reason
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.schedules import AdaptiveRatio, Schedule

PlanKey = tuple[int, int, torch.nn.Module | str | None, int | AdaptiveRatio]
"""Downsample, the number of the call in its step, what shares a plan, and how many tokens are to be removed."""


@dataclass(frozen=True)
class Level:
    """A resolution in one step.

    Args:
        downsample: 1, 2, 4 or 8.
        height, width: Tokens.
        removed: Tokens to remove from each sample; with an adaptive ratio the most that may be.
        cells: Sources and destinations; ``None`` if nothing is removed.
        ratio: What decided that; ``None`` if the configuration leaves the level alone.
        reason: Why nothing is removed.
    """

    downsample: int
    height: int
    width: int
    removed: int = 0
    cells: Cells | None = None
    ratio: Schedule | AdaptiveRatio | None = None
    reason: Reason | None = None


@dataclass
class LayerRecord:
    """A layer in the latest generation.

    Args:
        name: The layer's name in its model.
        downsample: Its level; ``None`` if its token count fits no level.
        calls: How often it ran.
        tokens: Tokens that it was given, over all calls, of one sample.
        removed: Tokens that merging removed from it, likewise.
        left_alone: Why its latest call was left alone, as data; ``None`` if it was merged.
    """

    name: str
    downsample: int | None = None
    calls: int = 0
    tokens: int = 0
    removed: int = 0
    left_alone: Reason | None = None

    @property
    def reason(self) -> str | None:
        """The same in words."""
        return None if self.left_alone is None else str(self.left_alone)

    @property
    def share(self) -> float:
        """Share of tokens removed, in [0, 1)."""
        return self.removed / self.tokens if self.tokens else 0.0


@dataclass
class StepRecord:
    """A step of the latest generation: the share of tokens that was removed at each level."""

    index: int | None
    noise_level: float
    removed: dict[int, float] = field(default_factory=dict)


@dataclass
class Record:
    """What was done in one generation, as plain data.

    Args:
        layers: By name.
        steps: One entry a call of the model; of a loop that never begins a new generation the latest.
        plans: Of the latest call: a level's plan with the height and width of its tokens, by downsample.
        kept_bytes: Memory of the outputs that full steps have left.
        why_nothing: Why a call in which something should have been merged merged nothing, with the mend.
        late: Half of the schedule is over, where one is known.
        judged: The user has been told, or need not be.
    """

    layers: dict[str, LayerRecord] = field(default_factory=dict)
    steps: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=1000))
    plans: dict[int, tuple[MergePlan, int, int]] = field(default_factory=dict)
    kept_bytes: int = 0
    why_nothing: str | None = None
    late: bool = False
    judged: bool = False


@dataclass
class BlockState:
    """The transformer block under way.

    Args:
        found: The plan that its layers share, or why there is none.
        inside: The plan by which its input was merged, if the whole block runs on merged tokens.
        gate_decision: Why the gate leaves it alone; ``None`` if it does not.
        obstacle: Why it cannot run on merged tokens as a whole.
        entered: What was to be done with its input, the input, and the same merged; ``None`` if nobody asked.
        layer: What is to be done in the layer under way inside it.
        pair: What is to be done in its attention and its MLP, where these run side by side.
    """

    found: MergePlan | Reason | None = None
    inside: MergePlan | None = None
    gate_decision: Reason | None = None
    obstacle: Reason | None = None
    entered: tuple[Answer, Tensor, Tensor | None] | None = None
    layer: Answer | None = None
    pair: Merge | Leave | None = None

    @property
    def merged(self) -> bool:
        """True if a block or layer is under way on merged tokens, which its hooks are to unmerge."""
        entered = self.entered is not None and self.entered[2] is not None
        return entered or isinstance(self.layer, Merge) or isinstance(self.pair, Merge)

    def forget(self) -> None:
        """Between blocks. The object stays: ``torch.compile`` does not see a thread's field change within a graph."""
        self.found = self.inside = self.gate_decision = self.obstacle = None
        self.entered = self.layer = self.pair = None


@dataclass(eq=False)
class Call:
    """One call of a model. It stays as it is when the next one comes: gradient checkpointing may run its blocks again.

    Args:
        step: Where it stands.
        place: Which of a layer's kept outputs is of this call.
        cached: Whether it is a feature cache's cached step; ``None`` if there is no such cache.
        full: Whether it is a full step, on which the layers that merge on others keep their outputs.
        levels: By number of tokens.
        plans: Those made, and those that last from the call before.
        too_few: Where an adaptive ratio found too few tokens alike, in (batch, tokens).
        skips: Tells of a layer, by name, if cached steps skip it.
        attention_level: The downsample at which a cache skips self-attention alone.
        record: Where to note what is done; ``None`` while the gate measures.
        video: Frames are samples of the layers' batches, so these may be larger than the call's.
        running: Between the model's pre-hook and its hook.
        gradients: Whether gradients are wanted, so that checkpointed blocks may be run again.
        used: The kept outputs that layers have used, where gradients are wanted.
        ran: The levels, by downsample, at which a layer has run.
        trial: Of a call of the gate's own: what it is to have decided, or ``None`` for merging.
        text_tokens: That a transformer was given.
        obstacle: Why nothing can be merged in it.
        between: Why tokens cannot stay merged from one block to the next.
    """

    step: Step
    place: int = 0
    cached: bool | None = None
    full: bool = False
    levels: dict[int, Level] = field(default_factory=dict)
    plans: dict[PlanKey, MergePlan] = field(default_factory=dict)
    too_few: dict[PlanKey, torch.Size] = field(default_factory=dict)
    skips: Callable[[str], bool] | None = None
    attention_level: int | None = None
    record: Record | None = None
    video: bool = False
    running: bool = True
    gradients: bool = False
    used: dict[torch.nn.Module, Tensor] = field(default_factory=dict)
    ran: set[int] = field(default_factory=set)
    trial: Reason | None = None
    text_tokens: int = 0
    obstacle: Reason | None = None
    between: Reason | None = None


class Generation:
    """From a generation's first call to the next one's.

    Args:
        tracker: Reads the calls' steps; of the thread, or of the scope that said that this generation begins.
    """

    def __init__(self, tracker: StepTracker) -> None:
        self.tracker = tracker
        self.record = Record()
        self.latest: Call | None = None
        self._steps: dict[int, Step] = {}  # the latest of each call of a step: guidance branches may be calls
        self._first: dict[int, int] = {}  # the number of the step at which the cadence of full steps began

    def settle(self, call: Call, config: ToMeConfig) -> list[int]:
        """Decide what lasts into a call from those before it, and if it is a full step.

        Args:
            call: Its step and whether it is cached are known.
            config: What lasts how long.

        Returns:
            The places whose kept outputs do not hold any more.
        """
        step, before = call.step, self._steps.get(call.step.call)
        if self.latest is not None and not step.ambiguous and _plans_last(config, self.latest.step, step, call.cached):
            other_size = before is not None and not step.same_size(before)
            gone = step.call if other_size else None
            call.plans = {key: plan for key, plan in self.latest.plans.items() if key[1] != gone}
            call.too_few = {key: size for key, size in self.latest.too_few.items() if key[1] != gone}
        dropped = self._settle_full_step(call, config)
        self._steps[step.call] = step
        self.latest = call
        return dropped

    def _settle_full_step(self, call: Call, config: ToMeConfig) -> list[int]:
        step, every = call.step, config.full_every
        if every is None:
            return []
        call.place = 0 if step.ambiguous else step.call
        before = self._steps.get(call.place)
        begins = before is None or not (step.ambiguous or step.same_size(before))
        if begins:
            self._first[call.place] = step.number
        call.full = call.cached is False if every == "cache" else (step.number - self._first[call.place]) % every == 0
        if step.ambiguous:
            return [0, *self._first]
        return [call.place] if begins else []


class Current(ThreadLocal):
    """The generation, the call and the block that a thread is at."""

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.call: Call | None = None
        self.block = BlockState()


def _plans_last(config: ToMeConfig, before: Step, step: Step, cached: bool | None) -> bool:
    """True if the plans of a step hold for the next call too."""
    every = config.plan_every
    if every == "cache":
        return bool(cached) or (step.number == before.number and step.call > before.call)
    return every > 1 and step.number // every == before.number // every
