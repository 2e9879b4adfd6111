"""What the layers of one model share while it runs: the step, its plans, and the record of what was merged."""

import hashlib
import warnings
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from tomesd_plus.caching.cache import FeatureCache, feature_cache_on
from tomesd_plus.host.models import owners_of_hooks, sample_and_timestep
from tomesd_plus.host.step import Step, StepTracker, outside_graphs
from tomesd_plus.matching import MergePlan
from tomesd_plus.merging.blocks import BlockMerging
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.detail import WHOLE_STEP, DetailKeeper
from tomesd_plus.merging.levels import Level, levels_of
from tomesd_plus.merging.planner import Planner
from tomesd_plus.merging.reasons import why_idle
from tomesd_plus.merging.report import LayerRecord, StepRecord


class TokenMerger:
    """Makes and keeps the plans of one model. Its bound methods are the hooks on the model; they copy and pickle.

    Args:
        config: What to merge.
        train_timesteps: Timesteps of the model's training, for the noise level.
        name: Stands before layer names in the report.
        excluded: Layers that no processor of this merger could be put on, and why; for the report.
    """

    step: Step | None  # the model's call under way, or the latest
    running: bool  # between the model's pre-hook and its hook
    levels: dict[int, Level]  # of this step, by number of tokens
    cache: FeatureCache | None  # on the same model
    _ran: set[int]  # the levels at which a layer has run in this step

    def __init__(
        self,
        config: ToMeConfig,
        train_timesteps: int = 1000,
        name: str = "",
        excluded: dict[str, str] | None = None,
    ) -> None:
        self.config = config
        self.name = name
        self.excluded = excluded or {}
        self.tracker = StepTracker(train_timesteps)
        self.records: dict[str, LayerRecord] = {}
        self.steps: deque[StepRecord] = deque(maxlen=1000)  # a caller may never begin a new generation
        self.attentions: list[nn.Module] = []
        self.planner = Planner(config)
        self.details = DetailKeeper(config.whole_every, config.mode)
        self.blocks = BlockMerging(self)
        self._merged_levels = {*config.schedules, *config.cached_schedules}
        self._handles: list[Any] = []
        self._names: dict[nn.Module, str] = {}
        self._lost: tuple[weakref.ref[nn.Module], list[nn.Module]] | None = None  # model and layers before a detour
        self._warned = False
        self._reset()

    # Installing -------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """True while the hooks are on a model."""
        return bool(self._handles)

    def attach(self, model: nn.Module, attentions: list[nn.Module]) -> None:
        """Put hooks on a model.

        Args:
            model: A UNet or ControlNet.
            attentions: Its attention layers whose processors use this merger. Once none does, the hooks go away.
        """
        self.attentions = attentions
        self._names = {module: f"{self.name}{name}" for name, module in model.named_modules()}
        self.details.attach(model)
        self.planner.stages = {module: name.partition(".attentions.")[0] for name, module in model.named_modules()}
        self._handles = [
            model.register_forward_pre_hook(self.begin_step, with_kwargs=True),
            model.register_forward_hook(self.end_step, always_call=True),
            *self.blocks.attach(model),
        ]

    def detach(self) -> None:
        """Take the hooks off again. The records stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._names.clear()
        self.planner.stages = {}
        self.attentions = []
        self._lost = None
        self.planner.forget()
        self.details.reset()
        self._reset()

    def _attach_again(self, model: "weakref.ref[nn.Module]", attentions: list[nn.Module]) -> None:
        """Processors that were replaced for a while are back, as after PAG: merge again from the next call on."""
        self._lost = None
        if (found := model()) is not None:
            self.attach(found, attentions)

    # The model's hooks ------------------------------------------------------------------------------------------

    @outside_graphs
    def begin_step(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: read the step, lay out its levels, drop plans that no longer hold."""
        if not any(getattr(attention.processor, "merger", None) is self for attention in self.attentions):
            lost = weakref.ref(model), self.attentions
            self.detach()  # the processors were replaced: nothing is left behind
            self._lost = lost
            return
        sample, timestep = sample_and_timestep(args, kwargs)
        before = self.step
        self._reset()
        self.step = step = self.tracker.observe(sample, timestep)
        self.running = True
        if step.new_generation:
            self.records = {name: LayerRecord(name, reason=reason) for name, reason in self.excluded.items()}
            self.steps.clear()
        self.steps.append(StepRecord(step.index, step.noise_level))
        self.cache = feature_cache_on(model)
        if self.cache is not None and self.cache.mode == "undecided":
            self.cache.when_decided.append(lambda cached: self._lay_out(step, before, cached, sample.device))
        else:
            cached = None if self.cache is None else self.cache.mode == "cached"
            self._lay_out(step, before, cached, sample.device)

    def _lay_out(self, step: Step, before: Step | None, cached: bool | None, device: torch.device) -> None:
        """Make the step's levels, and drop what does not hold on; a feature cache has told whether it is cached."""
        self.planner.begin_step(step, before, bool(cached))
        self.details.begin_step(step, cached)
        schedules = self.config.cached_schedules if cached else self.config.schedules
        if self.details.whole:  # no cells are drawn, unless a skipped ratio wants them
            schedules = self.config.skipped_schedules
        generator = None
        if self.config.destinations == "random":
            # By the noise level, not by counting: the same step draws the same cells, whatever ran before it.
            seed = hashlib.sha256(f"{self.config.seed} {step.noise_level:.6f}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "big"))
        self.levels = levels_of(step, self.config, schedules, generator, device)

    @outside_graphs
    def end_step(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model, also after one that failed: say so once if nothing at all was merged.

        Step and plans stay until the next call: gradient checkpointing runs the blocks once more, in backward.
        """
        if output is not None and self.step is not None and not self._warned:  # ``None`` after a failure
            self._warn_if_idle(self.step)
        self.running = False
        self.blocks.reset()

    # For the processors -----------------------------------------------------------------------------------------

    def plan_for(self, attention: nn.Module, hidden_states: Tensor) -> MergePlan | None:
        """The plan of a self-attention layer's input (batch, tokens, channels); ``None`` to leave it alone.

        Inside a block that is merged as a whole it is the plan by which the input has been merged already.
        """
        if not self._is_mine(attention):
            return None
        if self.blocks.inside:
            plan = self.blocks.plan
            return plan if plan is not None and plan.kept.shape == hidden_states.shape[:2] else None
        if self.config.metric == "block_input":
            plan = self.blocks.plan
            plan = plan if plan is not None and plan.fits(hidden_states) else None
        else:
            plan = self.plan(hidden_states, attention)
            if plan is not None:  # else it may be an attention beside the block's own, which has its plan
                self.blocks.plan = plan
        if not self.config.merge_self_attention or self.config.merge_block:
            return None
        reason = self.reason(hidden_states.shape[1], attention) if plan is None else None
        self.record(attention, hidden_states.shape[1], plan.removed if plan else 0, reason)
        return plan

    def keep_detail(self, layer: nn.Module, output: Tensor) -> None:
        """On a whole step keep the output of a layer that other steps merge, (batch, tokens, channels)."""
        whole = self.active and self.details.whole and self.merges_at(output.shape[1])
        if whole and not self._is_skipped(layer):
            self.details.keep(layer, output)

    def merges_at(self, tokens: int) -> bool:
        """True if layers of so many tokens are merged on some steps."""
        level = self.levels.get(tokens)
        return level is not None and level.downsample in self._merged_levels

    def _is_skipped(self, layer: nn.Module) -> bool:
        """True if a layer does not run on the steps between; a graph that knew its name would serve no other layer."""
        if self.details.every != "full" or self.cache is None or torch.compiler.is_compiling():
            return False
        return self.cache.skips(self._names.get(layer, "").removeprefix(self.name))

    def stays_whole(self, layer: nn.Module) -> bool:
        """True on whole steps, but for a layer whose self-attention the configuration merges there."""
        return self.details.whole and (self.config.skipped_ratio is None or not self._is_skipped(layer))

    def reused(self, attention: nn.Module, hidden_states: Tensor) -> Tensor | None:
        """What the layer gave at the last whole step, if that is to be taken again, (batch, tokens, channels)."""
        if not self._is_mine(attention):
            return None
        tokens = hidden_states.shape[1]
        level = self.levels.get(tokens)
        merged = level is not None and level.cells is not None
        output = self.details.kept(attention, hidden_states) if merged else None
        missing = merged and not self.details.whole
        nothing = "there is no output of a whole step" if missing else self.reason(tokens, attention)
        self.record(attention, tokens, 0, nothing if output is None else "its last whole output was taken again")
        return output

    def record(self, layer: nn.Module, tokens: int, removed: int, reason: str | None = None) -> None:
        """Note what was done to a layer in this step; compiled layers leave no notes."""
        if self.step is None or not self.running or self.blocks.measuring or torch.compiler.is_compiling():
            return
        name = self._names.get(layer, type(layer).__name__)
        record = self.records.setdefault(name, LayerRecord(name))
        level = self.levels.get(tokens)
        record.downsample = level.downsample if level else None
        record.calls += 1
        record.tokens += tokens
        record.removed += removed
        record.reason = reason
        if level:
            self._ran.add(level.downsample)
        if removed and level:
            self.steps[-1].removed[level.downsample] = removed / tokens

    def _is_mine(self, attention: nn.Module) -> bool:
        """True in a call of the model that the merger serves; else see whether that model has come back."""
        if not self.active:
            if self._lost is not None:
                self._attach_again(*self._lost)
            self._warn_if_stranger(attention)
        return self.active

    # Planning ---------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """True in the model's call, and when a checkpointed block of it is run once more for gradients."""
        return self.step is not None and (self.running or torch.is_grad_enabled())

    def plan(self, hidden_states: Tensor, layer: nn.Module) -> MergePlan | None:
        level = self.levels.get(hidden_states.shape[1])
        if level is None or level.cells is None or self.blocks.declined is not None or self.stays_whole(layer):
            return None
        return self.planner.plan(hidden_states, level, layer)

    # Telling the user -------------------------------------------------------------------------------------------

    def reason(self, tokens: int, layer: nn.Module) -> str:
        assert self.step is not None
        level = self.levels.get(tokens)
        if level is None:
            return f"{tokens} tokens fit no level of {self.step.height} × {self.step.width} latents"
        if self.stays_whole(layer) and self.merges_at(tokens):
            return WHOLE_STEP
        if level.reason is None and self.blocks.declined is not None:
            return str(self.blocks.declined)
        return level.reason or "too few tokens are alike"

    def _warn_if_idle(self, step: Step) -> None:
        if self.details.whole or self.config.reuse_attention or self.blocks.gate is not None:
            return  # there is a good reason
        why = why_idle(self.records.values(), self.levels.values(), self.config, step.noise_level, self._ran)
        if why is not None:
            self._warned = True
            warnings.warn(f"Token merging has merged nothing: {why}.", stacklevel=2)

    def _warn_if_stranger(self, attention: nn.Module) -> None:
        if self.attached and attention not in self._names and not self._warned:
            self._warned = True
            warnings.warn(
                "A ToMeProcessor serves one model only, and this one serves another: give each model its own. "
                "Nothing is merged here.",
                stacklevel=2,
            )

    def _reset(self) -> None:
        self.step = None
        self.running = False
        self.levels = {}
        self.cache = None
        self._ran = set()
        self.blocks.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "step": None, "running": False, "levels": {}, "cache": None, "_lost": None}


def mergers_on(model: nn.Module) -> list[TokenMerger]:
    """The mergers whose hooks are on a model."""
    return owners_of_hooks(model, TokenMerger)
