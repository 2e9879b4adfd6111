"""Answers the one question of each layer: what is to be done with these tokens here?"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tomesd_plus.host.models import attends_over_frames, downsample_of
from tomesd_plus.host.transient import Transient
from tomesd_plus.matching import MergePlan
from tomesd_plus.merging.answers import AlreadyMerged, Answer, KeptOutputs, Leave, Merge, Reason, Why
from tomesd_plus.merging.config import Layer, ToMeConfig
from tomesd_plus.merging.generation import Call, Current, LayerRecord
from tomesd_plus.merging.wrapping import why_replaced

Role = Layer | Literal["block", "more_attention"]
"""What a layer is to its block; more attention is a second one among the same tokens, by the first one's plan."""
KEPT = "_tomesd_plus_kept"  # a layer's attribute: a field of its own lets compiled layers share graphs


class Plans(Protocol):
    """Says by which plan tokens are merged: :class:`~tomesd_plus.merging.planner.Planner`, or tomesd's own way."""

    def attach(self, names: Mapping[nn.Module, str]) -> None:
        """Learn the names of a model's modules."""

    def lay_out(self, call: Call, device: torch.device) -> None:
        """Before a call's first layer."""

    def plan(self, call: Call, hidden_states: Tensor, layer: nn.Module) -> MergePlan | Reason:
        """The plan for a layer's input, or why there is none."""


class Decider:
    """Answers, and notes what it has answered.

    Args:
        config: What to merge.
        plans: By which plan.
        prefix: Stands before the layers' names in the record.
    """

    def __init__(self, config: ToMeConfig, plans: Plans, prefix: str = "") -> None:
        self.config = config
        self.plans = plans
        self.prefix = prefix
        self.names: dict[nn.Module, str] = {}  # of the model's modules
        self.current = Current()
        self.latest: Transient[Call] = Transient()  # in any thread
        self._merged_levels = {*config.schedules, *config.cached_schedules}
        self._merges_on_full_steps = bool(config.full_schedules)

    def call(self) -> Call | None:
        """The model's call under way in this thread, or one whose checkpointed block is run again for gradients."""
        call = self.current.call
        again = call is not None and call.gradients and torch.is_grad_enabled()
        return call if call is not None and (call.running or again) else None

    def serves(self, layer: nn.Module) -> bool:
        """True if a layer is of the model; not looked up in a graph, which would then serve no other layer."""
        return torch.compiler.is_compiling() or layer in self.names

    def ask(self, layer: nn.Module, role: Role, hidden_states: Tensor, obstacle: Reason | None = None) -> Answer:
        """What is to be done with a layer's input.

        Args:
            layer: The attention layer, MLP or transformer block.
            role: Which of them it is.
            hidden_states: Its input, (batch, tokens, channels).
            obstacle: Why the layer cannot be run on merged tokens.
        """
        call = self.call()
        if call is None or not self.serves(layer):
            return Leave()
        if not torch.compiler.is_compiling() and attends_over_frames(self.names.get(layer, "")):
            obstacle = Reason(Why.frames)
        answer = self._answer(call, layer, role, hidden_states, obstacle or call.obstacle)
        if isinstance(answer, Merge) or (isinstance(answer, Leave) and answer.reason is not None):
            self._note(call, layer, hidden_states, answer)
        return answer

    def _answer(
        self, call: Call, layer: nn.Module, role: Role, hidden_states: Tensor, obstacle: Reason | None
    ) -> Answer:
        block = self.current.block
        if block.inside is not None:
            inside = block.inside.kept.shape == hidden_states.shape[:2] and obstacle is None
            return AlreadyMerged(block.inside) if inside else Leave(obstacle)
        if obstacle is None and not call.video and hidden_states.shape[0] != call.step.batch:
            obstacle = Reason(Why.other_batch, (hidden_states.shape[0], call.step.batch))
        if obstacle is not None and role in ("self_attention", "more_attention"):
            return Leave(obstacle)
        found = self._find(call, layer, role, hidden_states)
        layers = self.config.layers
        if role != layers and ("self_attention" if role == "more_attention" else role) not in layers:
            return Leave()
        if isinstance(found, MergePlan) and obstacle is None:
            if role == "block":
                block.inside = found
            return Merge(found, self.config.mode, self._kept(call, layer))
        reason = obstacle or (found if isinstance(found, Reason) else None)
        return Leave(reason, self._keep_in(call, layer, hidden_states, role, obstacle))

    def _find(self, call: Call, layer: nn.Module, role: Role, hidden_states: Tensor) -> MergePlan | Reason:
        """The plan for a layer; the first question in a block makes it, the others share it."""
        block = self.current.block
        if role == "block" or (role == "self_attention" and self.config.metric != "block_input"):
            found = self._why_not(call, layer, hidden_states) or self.plans.plan(call, hidden_states, layer)
            if role == "block" or isinstance(found, MergePlan):  # else it may be an attention beside the block's own
                block.found = found
            return found
        if call.full and role != "self_attention":  # self-attention alone may be merged on full steps
            return Reason(Why.full_step if self._merges_at(call, hidden_states) else Why.block_not_merged)
        if isinstance(block.found, MergePlan):
            return block.found if block.found.fits(hidden_states) else Reason(Why.other_tokens)
        if role == "self_attention":
            return block.found or Reason(Why.block_not_merged)
        return block.gate_decision or Reason(Why.block_not_merged)

    def _why_not(self, call: Call, layer: nn.Module, hidden_states: Tensor) -> Reason | None:
        """Why a layer's tokens are left alone whatever plan there may be: a full step, or the gate's decision."""
        level = call.levels.get(hidden_states.shape[1])
        if level is None:
            return None
        if call.full and not (self._merges_on_full_steps and self._skipped(call, layer)):
            return Reason(Why.full_step) if self._merges_at(call, hidden_states) else level.reason
        return self.current.block.gate_decision if level.cells is not None else None

    def _merges_at(self, call: Call, hidden_states: Tensor) -> bool:
        """True if layers of so many tokens are merged on some steps."""
        level = call.levels.get(hidden_states.shape[1])
        return level is not None and level.downsample in self._merged_levels

    def _skipped(self, call: Call, layer: nn.Module) -> bool:
        """True if a layer does not run on cached steps; a graph that knew its name would serve no other layer."""
        if self.config.full_every != "cache" or call.skips is None or torch.compiler.is_compiling():
            return False
        return call.skips(self.names.get(layer, ""))

    def _kept(self, call: Call, layer: nn.Module) -> Tensor | None:
        """The layer's output of the last full step, on the steps between."""
        if self.config.full_steps is None or call.full:
            return None
        if not call.running and not torch.compiler.is_compiling():
            return call.used.get(layer)
        kept = getattr(layer, KEPT, None)
        output = kept.outputs[call.place] if isinstance(kept, KeptOutputs) else None
        if output is not None and call.gradients and not torch.compiler.is_compiling():
            call.used[layer] = output  # a checkpointed block may be run again after other calls
        return output

    def _keep_in(
        self, call: Call, layer: nn.Module, hidden_states: Tensor, role: Role, obstacle: Reason | None
    ) -> tuple[KeptOutputs, int] | None:
        """Where a full step's output is kept, if other steps merge the layer."""
        if not call.full or not call.running or call.step.ambiguous or (role == "block" and obstacle is not None):
            return None
        if not self._merges_at(call, hidden_states) or self._skipped(call, layer):
            return None
        kept = getattr(layer, KEPT, None)
        return (kept, call.place) if isinstance(kept, KeptOutputs) else None

    def _note(self, call: Call, layer: nn.Module, hidden_states: Tensor, answer: Leave | Merge) -> None:
        """Note what was answered; compiled layers leave no notes."""
        if call.record is None or not call.running or torch.compiler.is_compiling():
            return
        name = self.prefix + self.names.get(layer, type(layer).__name__)
        record = call.record.layers.setdefault(name, LayerRecord(name))
        tokens = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2:].numel()
        removed = answer.plan.removed if isinstance(answer, Merge) else 0
        level = call.levels.get(tokens)
        record.downsample = level.downsample if level else None
        record.calls += 1
        record.tokens += tokens
        record.removed += removed
        record.left_alone = answer.reason if isinstance(answer, Leave) else None
        if level:
            call.ran.add(level.downsample)
            if removed:
                call.record.steps[-1].removed[level.downsample] = removed / tokens

    def replaced(self, attentions: Iterable[Any]) -> dict[str, Reason]:
        """The self-attention layers, by name, whose processor of ours was replaced, and by what.

        Args:
            attentions: The layers that were given one.
        """
        return {
            self.prefix + self.names[attention]: why_replaced(attention.processor)
            for attention in attentions
            if not hasattr(attention.processor, "attachment") and not getattr(attention, "is_cross_attention", False)
        }

    def note_replaced(self, model: nn.Module, call: Call, attentions: Iterable[Any]) -> None:
        """Note :meth:`replaced` layers at the end of a call, for nobody has asked about them in it."""
        levels = {level.downsample: level for level in call.levels.values()}
        for name, reason in self.replaced(attentions).items():
            own_name = name.removeprefix(self.prefix)
            downsample = next(iter(levels)) if len(levels) == 1 else downsample_of(model, own_name)
            skipped = call.skips is not None and (call.skips(own_name) or downsample == call.attention_level)
            if call.record is None or (call.cached and skipped):
                continue
            record = call.record.layers.setdefault(name, LayerRecord(name))
            record.left_alone, record.downsample = reason, downsample
            record.calls += 1
            if downsample in levels:
                level = levels[downsample]
                record.tokens += level.height * level.width
                call.ran.add(level.downsample)
