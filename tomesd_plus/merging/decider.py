"""Answers the one question of each layer: what is to be done with these tokens here?"""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from tomesd_plus.host.transient import Transient
from tomesd_plus.matching import MergePlan
from tomesd_plus.merging.answers import AlreadyMerged, Answer, KeptOutputs, Leave, Merge, Reason, Why
from tomesd_plus.merging.config import Layer, ToMeConfig
from tomesd_plus.merging.generation import Call, Current, LayerRecord, Level

Role = Layer | Literal["block"]
KEPT = "_tomesd_plus_kept"  # a layer's attribute: a field of its own lets compiled layers share graphs


class Plans(Protocol):
    """Says by which plan tokens are merged: :class:`~tomesd_plus.merging.planner.Planner`, or tomesd's own way."""

    stages: dict[nn.Module, str]
    names: dict[nn.Module, str]

    def lay_out(self, call: Call, device: torch.device) -> None:
        """Before a call's first layer."""

    def plan(self, call: Call, hidden_states: Tensor, layer: nn.Module) -> MergePlan | Reason:
        """The plan for a layer's input, or why there is none."""

    def merges_at(self, level: Level | None) -> bool:
        """True if layers are merged at a level on some steps."""

    def skipped(self, call: Call, layer: nn.Module) -> bool:
        """True if a layer does not run on a feature cache's cached steps."""


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
        self.current = Current()
        self.latest: Transient[Call] = Transient()  # in any thread

    def call(self) -> Call | None:
        """The model's call under way in this thread, or one whose checkpointed block is run again for gradients."""
        call = self.current.call
        return call if call is not None and (call.running or torch.is_grad_enabled()) else None

    def ask(self, layer: nn.Module, role: Role, hidden_states: Tensor, obstacle: Reason | None = None) -> Answer:
        """What is to be done with a layer's input.

        Args:
            layer: The attention layer, MLP or transformer block.
            role: Which of them it is.
            hidden_states: Its input, (batch, tokens, channels).
            obstacle: Why the layer cannot be run on merged tokens.
        """
        call = self.call()
        if call is None:
            return Leave()
        answer = self._answer(call, layer, role, hidden_states, obstacle)
        if isinstance(answer, Merge) or (isinstance(answer, Leave) and answer.reason is not None):
            self._note(call, layer, hidden_states, answer)
        return answer

    def _answer(
        self, call: Call, layer: nn.Module, role: Role, hidden_states: Tensor, obstacle: Reason | None
    ) -> Answer:
        block = call.block
        if block.inside is not None:
            inside = block.inside.kept.shape == hidden_states.shape[:2] and obstacle is None
            return AlreadyMerged(block.inside) if inside else Leave(obstacle)
        if obstacle is not None and role == "self_attention":
            return Leave(obstacle)
        found = self._find(call, layer, role, hidden_states)
        if role not in self.config.layers and role != self.config.layers:
            return Leave()
        if isinstance(found, MergePlan) and obstacle is None:
            if role == "block":
                block.inside = found
            return Merge(found, self.config.mode, self._kept(call, layer))
        reason = obstacle or (found if isinstance(found, Reason) else None)
        return Leave(reason, self._keep_in(call, layer, hidden_states, role, obstacle))

    def _find(self, call: Call, layer: nn.Module, role: Role, hidden_states: Tensor) -> MergePlan | Reason:
        """The plan for a layer; the first question in a block makes it, the others share it."""
        block = call.block
        if role == "block" or (role == "self_attention" and self.config.metric != "block_input"):
            found = self.plans.plan(call, hidden_states, layer)
            if role == "block" or isinstance(found, MergePlan):  # else it may be an attention beside the block's own
                block.found = found
            return found
        if call.full and role != "self_attention":  # self-attention alone may be merged on full steps
            level = call.levels.get(hidden_states.shape[1])
            return Reason(Why.full_step) if self.plans.merges_at(level) else Reason(Why.block_not_merged)
        if isinstance(block.found, MergePlan):
            return block.found if block.found.fits(hidden_states) else Reason(Why.other_tokens)
        if role == "self_attention":
            return block.found or Reason(Why.block_not_merged)
        return block.declined or Reason(Why.block_not_merged)

    def _kept(self, call: Call, layer: nn.Module) -> Tensor | None:
        """The layer's output of the last full step, on the steps between."""
        if self.config.full_steps is None or call.full:
            return None
        if not call.running and not torch.compiler.is_compiling():
            return call.used.get(layer)
        kept = getattr(layer, KEPT, None)
        output = kept.outputs[call.place] if isinstance(kept, KeptOutputs) else None
        if output is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            call.used[layer] = output  # a checkpointed block may be run again after other calls
        return output

    def _keep_in(
        self, call: Call, layer: nn.Module, hidden_states: Tensor, role: Role, obstacle: Reason | None
    ) -> tuple[KeptOutputs, int] | None:
        """Where a full step's output is kept, if other steps merge the layer."""
        if not call.full or not call.running or call.step.ambiguous or (role == "block" and obstacle is not None):
            return None
        if not self.plans.merges_at(call.levels.get(hidden_states.shape[1])) or self.plans.skipped(call, layer):
            return None
        kept = getattr(layer, KEPT, None)
        return (kept, call.place) if isinstance(kept, KeptOutputs) else None

    def _note(self, call: Call, layer: nn.Module, hidden_states: Tensor, answer: Leave | Merge) -> None:
        """Note what was answered; compiled layers leave no notes."""
        if call.record is None or not call.running or torch.compiler.is_compiling():
            return
        name = self.prefix + self.plans.names.get(layer, type(layer).__name__)
        record = call.record.layers.setdefault(name, LayerRecord(name))
        tokens = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2:].numel()
        removed = answer.plan.removed if isinstance(answer, Merge) else 0
        level = call.levels.get(tokens)
        record.downsample = level.downsample if level else None
        record.calls += 1
        record.tokens += tokens
        record.removed += removed
        record.reason = answer.reason if isinstance(answer, Leave) else None
        if level:
            call.ran.add(level.downsample)
            if removed:
                call.record.steps[-1].removed[level.downsample] = removed / tokens
