"""What the layers of one model share while it runs: the step, its plans, and the record of what was merged."""

import hashlib
import warnings
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from tomesd_plus.config import ToMeConfig
from tomesd_plus.matching import bipartite_match, destination_mask, max_removed
from tomesd_plus.plan import MergePlan
from tomesd_plus.report import LayerRecord, StepRecord
from tomesd_plus.step import Step, StepTracker


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
    plans: dict[tuple[int, nn.Module | None], tuple[MergePlan, int, int]]  # by level and, if not shared, layer;
    # with the level's height and width in tokens
    block_plan: MergePlan | None  # that of the transformer block under way
    _merged_layer: nn.Module | None  # between its pre-hook and its hook
    generator: torch.Generator | None  # of this step's random destinations

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
        self._schedules = config.schedules
        self._handles: list[Any] = []
        self._names: dict[nn.Module, str] = {}
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
        self._handles = [
            model.register_forward_pre_hook(self.begin_step, with_kwargs=True),
            model.register_forward_hook(self.end_step),
        ]
        config = self.config
        if config.metric != "block_input" and not config.merge_cross_attention and not config.merge_mlp:
            return
        for block in model.modules():
            if isinstance(block, BasicTransformerBlock):
                self._handles.append(block.register_forward_pre_hook(self.enter_block, with_kwargs=True))
                if config.merge_cross_attention and block.attn2 is not None:
                    self._hook_around(block.attn2)
                if config.merge_mlp:
                    self._hook_around(block.ff)

    def detach(self) -> None:
        """Take the hooks off again. The records stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._names.clear()
        self.attentions = []
        self._reset()

    def _hook_around(self, layer: nn.Module) -> None:
        self._handles.append(layer.register_forward_pre_hook(self.merge_input, with_kwargs=True))
        self._handles.append(layer.register_forward_hook(self.unmerge_output))

    # The model's hooks ------------------------------------------------------------------------------------------

    def begin_step(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: read the step, drop the last one's plans, reseed."""
        if not any(getattr(attention.processor, "merger", None) is self for attention in self.attentions):
            self.detach()  # the processors were replaced: nothing is left behind
            return
        self._reset()
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        self.step = self.tracker.observe(sample, timestep)
        self.running = True
        if self.step.new_generation:
            self.records = {name: LayerRecord(name, reason=reason) for name, reason in self.excluded.items()}
            self.steps.clear()
        self.steps.append(StepRecord(self.step.index, self.step.noise_level))
        # By the noise level, not by counting: the same step draws the same grid, whatever ran before it.
        seed = hashlib.sha256(f"{self.config.seed} {self.step.noise_level:.6f}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "big"))

    def end_step(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model: say so once if nothing at all was merged.

        Step and plans stay until the next call: gradient checkpointing runs the blocks once more, in backward.
        """
        if self.step is not None and not self._warned:
            self._warn_if_idle(self.step)
        self.running = False

    def enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a transformer block: forget the last block's plan, or match on the raw input at once."""
        self.block_plan = None
        if self.config.metric == "block_input" and self._active:
            self.block_plan = self._plan(args[0] if args else kwargs["hidden_states"], block)

    def merge_input(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before cross-attention or MLP: merge the input by the block's plan."""
        plan = self.block_plan
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if plan is None or not plan.fits(hidden_states) or kwargs.get("ip_adapter_masks") is not None:
            self.record(layer, hidden_states.shape[1], 0, "its block has no plan")
            return None
        self._merged_layer = layer
        self.record(layer, plan.tokens, plan.removed)
        hidden_states = plan.merge(hidden_states, self.config.mode)
        return ((hidden_states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_states})

    def unmerge_output(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After it: bring the output back to the block's tokens."""
        if self._merged_layer is not layer or self.block_plan is None:
            return None
        self._merged_layer = None
        return self.block_plan.unmerge(output)

    # For the processors -----------------------------------------------------------------------------------------

    def plan_for(self, attention: nn.Module, hidden_states: Tensor) -> MergePlan | None:
        """The plan of a self-attention layer's input (batch, tokens, channels); ``None`` to leave it alone."""
        if not self._active:
            self._warn_if_stranger(attention)
            return None
        if self.config.metric == "block_input":
            plan = self.block_plan if self.block_plan is not None and self.block_plan.fits(hidden_states) else None
        else:
            plan = self._plan(hidden_states, attention)
            if plan is not None:  # else it may be an attention beside the block's own, which has its plan
                self.block_plan = plan
        if not self.config.merge_self_attention:
            return None
        reason = self._reason(hidden_states.shape[1]) if plan is None else None
        self.record(attention, hidden_states.shape[1], plan.removed if plan else 0, reason)
        return plan

    def record(self, layer: nn.Module, tokens: int, removed: int, reason: str | None = None) -> None:
        """Note what was done to a layer in this step."""
        if self.step is None or not self.running:
            return
        name = self._names.get(layer, type(layer).__name__)
        record = self.records.setdefault(name, LayerRecord(name))
        level = self.step.grid(tokens)
        record.downsample = level[0] if level else None
        record.calls += 1
        record.tokens += tokens
        record.removed += removed
        record.reason = reason
        if removed and level:
            self.steps[-1].removed[level[0]] = removed / tokens

    # Planning ---------------------------------------------------------------------------------------------------

    @property
    def _active(self) -> bool:
        """True in the model's call, and when a checkpointed block of it is run once more for gradients."""
        return self.step is not None and (self.running or torch.is_grad_enabled())

    def _plan(self, hidden_states: Tensor, layer: nn.Module) -> MergePlan | None:
        assert self.step is not None
        level = self.step.grid(hidden_states.shape[1])
        if level is None or level[0] not in self._schedules:
            return None
        downsample, height, width = level
        removed = self._removed(downsample, height, width)
        if removed == 0:
            return None
        key = (downsample, None if self.config.share_plan else layer)
        if key not in self.plans or not self.plans[key][0].fits(hidden_states):
            plan = self._match(_metric(self.config, hidden_states, layer), height, width, removed)
            self.plans[key] = (plan, height, width)
        return self.plans[key][0]

    def _removed(self, downsample: int, height: int, width: int) -> int:
        assert self.step is not None
        ratio = self._schedules[downsample](self.step.noise_level)
        return min(int(height * width * ratio), max_removed(height, width, self.config.cell_size))

    def _match(self, metric: Tensor, height: int, width: int, removed: int) -> MergePlan:
        mask = self._destinations(height, width, metric.shape[0], metric.device)
        sources = max_removed(height, width, self.config.cell_size)
        return bipartite_match(metric, mask, height * width - sources, removed)

    def _destinations(self, height: int, width: int, batch: int, device: torch.device) -> Tensor:
        generator = self.generator if self.config.destinations == "random" else None
        return destination_mask(height, width, self.config.cell_size, generator, device)

    # Telling the user -------------------------------------------------------------------------------------------

    def _reason(self, tokens: int) -> str:
        assert self.step is not None
        level = self.step.grid(tokens)
        if level is None:
            return f"{tokens} tokens fit no level of {self.step.height} × {self.step.width} latents"
        if level[0] not in self._schedules:
            return f"level {level[0]} is not merged by the configuration"
        if not max_removed(*level[1:], self.config.cell_size):
            return f"no cell fits in {level[1]} × {level[2]} tokens"
        if self._schedules[level[0]](self.step.noise_level) > 0:
            return f"the ratio is less than one of {tokens} tokens"
        return "the ratio is 0 at this noise level"

    def _warn_if_idle(self, step: Step) -> None:
        wanted = [level for level, schedule in self._schedules.items() if schedule(step.noise_level) > 0]
        if not wanted or any(record.removed for record in self.records.values()):
            return
        self._warned = True
        levels = sorted({record.downsample for record in self.records.values() if record.downsample})
        if levels and not set(levels) & set(wanted):
            to_do = (
                "give ratio one of them"
                if isinstance(self.config.ratio, Mapping)
                else f"set max_downsample={levels[0]}"
            )
            why = f"this model has self-attention at levels {levels} only; {to_do}"
            if levels[0] == 2:
                why += " (SDXL has none at full resolution)"
        else:
            why = "; ".join(sorted({record.reason for record in self.records.values() if record.reason}))
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
        self.plans = {}
        self.block_plan = None
        self._merged_layer = None
        self.generator = None

    def __getstate__(self) -> dict[str, Any]:
        nothing = dict.fromkeys(("step", "block_plan", "_merged_layer", "generator"))
        return {**self.__dict__, **nothing, "running": False, "plans": {}}


def mergers_on(model: nn.Module) -> list[TokenMerger]:
    """The mergers whose hooks are on a model."""
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, TokenMerger)]


def _metric(config: ToMeConfig, hidden_states: Tensor, attention: Any) -> Tensor:
    if config.metric != "keys":
        return hidden_states.detach()
    with torch.no_grad():
        keys = attention.to_k(hidden_states)  # (batch, tokens, heads · channels)
        return keys.unflatten(-1, (attention.heads, -1)).mean(dim=2)
