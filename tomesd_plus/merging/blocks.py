"""The hooks on transformer blocks and on the layers inside them, and the gate's measurements of blocks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tomesd_plus.host.arguments import argument, first, positions, with_first
from tomesd_plus.host.models import attends_over_frames
from tomesd_plus.host.transient import Transient, TransientDict
from tomesd_plus.merging.answers import Leave, Merge, Reason, Why
from tomesd_plus.merging.config import Layer
from tomesd_plus.merging.decider import Decider
from tomesd_plus.merging.gate import Decision, Gate, judged_removal, kernel_of, kind_of_block
from tomesd_plus.merging.generation import BlockState, Call

_MEASURING = threading.Lock()  # one measurement at a time: another thread's work would count


class BlockHooks:
    """The hooks on a model's transformer blocks; they copy and pickle.

    Args:
        decider: Of the model.
    """

    def __init__(self, decider: Decider) -> None:
        self.decider = decider
        config = decider.config
        self.gate = None if config.gate == "off" else Gate(refresh=config.gate == "remeasure")
        self.decisions: TransientDict[tuple[Any, ...], Decision] = TransientDict()
        self._places: dict[str, int] = {}  # of a block's arguments
        self._calls: Transient[WeakTensorKeyDictionary] = Transient()

    def attach(self, model: nn.Module) -> list[Any]:
        """Put the hooks that the configuration needs on a model; returns their handles."""
        config, handles = self.decider.config, []
        for block in _blocks(model):
            self._places = positions(type(block))
            handles.append(block.register_forward_pre_hook(self.enter, with_kwargs=True))
            if config.metric == "block_input":
                handles.append(block.register_forward_hook(self.leave))
        for layer in self.layers(model) if config.layers != "block" else []:
            hooks = LayerHooks(self.decider, "cross_attention" if isinstance(layer, Attention) else "mlp")
            handles.append(layer.register_forward_pre_hook(hooks.merge_input, with_kwargs=True))
            handles.append(layer.register_forward_hook(hooks.unmerge_output))
        return handles

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers beside self-attention that run on merged tokens: blocks, or their cross-attentions and MLPs."""
        config, blocks = self.decider.config, _blocks(model)
        if config.layers == "block":
            return blocks
        inner = {"cross_attention": "attn2", "mlp": "ff"}
        found = [getattr(block, name) for block in blocks for role, name in inner.items() if role in config.layers]
        return [layer for layer in found if layer is not None]

    def enter(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a block: forget the last one's state; match on the raw input, and merge it, if so wanted."""
        hidden_states = argument(self._places, args, kwargs, "hidden_states")
        self._find_call(hidden_states)
        call = self.decider.call()
        if call is None:
            return None
        state = self.decider.current.block
        state.forget()
        if self.gate is not None:
            state.gate_decision = self._gate_decision(self.gate, call, block, args, kwargs)
        if self.decider.config.metric != "block_input":
            return None
        obstacle = self._obstacle(call, block, args, kwargs) if self.decider.config.layers == "block" else None
        answer = self.decider.ask(block, "block", hidden_states, obstacle)
        merged = answer.merge(hidden_states) if isinstance(answer, Merge) else None
        if merged is not None or (isinstance(answer, Leave) and answer.keep_in is not None):
            state.entered = (answer, hidden_states, merged)
        return None if merged is None else with_first(args, kwargs, "hidden_states", merged)

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After it: what the block has added to a merged token is added to all tokens that it stands for."""
        state = self.decider.current.block
        if state.entered is None:
            return None
        answer, hidden_states, merged = state.entered
        state.forget()
        if isinstance(answer, Merge) and merged is not None:
            return hidden_states + answer.unmerge(output - merged)
        if isinstance(answer, Leave) and answer.keep_in is not None:
            answer.done(output - hidden_states)
        return None

    def _find_call(self, hidden_states: Tensor) -> None:
        """Let a checkpointed block that is run again for gradients find its call, by its input.

        PyTorch gives it the very tensors of the first time, but on CUDA in another thread, and perhaps after other
        calls of the model.
        """
        current, call = self.decider.current, self.decider.current.call
        if torch.compiler.is_compiling():
            return
        if self._calls.value is None:
            self._calls.value = WeakTensorKeyDictionary()
        if call is not None and call.running:
            if call.gradients:
                self._calls.value[hidden_states] = call
        elif torch.is_grad_enabled():
            # Re-entrant checkpointing gives it copies: then it is the thread's latest call, or in a thread of
            # autograd's own the latest of all.
            likeliest = call if current.generation is not None else self.decider.latest.value
            current.call = self._calls.value.get(hidden_states, likeliest)

    def _obstacle(self, call: Call, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reason | None:
        """Why a block cannot run on merged tokens as a whole, or ``None``."""
        if argument(self._places, args, kwargs, "attention_mask") is not None:
            return Reason(Why.mask)
        level = call.levels.get(argument(self._places, args, kwargs, "hidden_states").shape[1])
        if level is not None and level.downsample == call.attention_level:
            return Reason(Why.attention_cached)
        extra = argument(self._places, args, kwargs, "cross_attention_kwargs") or {}
        if extra.get("gligen") is not None or extra.get("ip_adapter_masks") is not None:
            return Reason(Why.places)
        if getattr(getattr(block.attn1.processor, "attachment", None), "decider", None) is not self.decider:
            return Reason(Why.attention_left_alone)
        return None

    def attention_of(self, block: Any) -> Any:
        """A block's self-attention layer."""
        return block.attn1

    def more_of_kind(self, call: Call, block: nn.Module) -> str:
        """What else the time of a block depends on."""
        return ""

    # The gate ---------------------------------------------------------------------------------------------------

    def _gate_decision(
        self, gate: Gate, call: Call, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Reason | None:
        """Why merging is left off in a block; it is measured both ways, unless that was done before."""
        if call.record is None:  # the gate's own call
            return call.trial
        hidden_states = argument(self._places, args, kwargs, "hidden_states")
        level = call.levels.get(hidden_states.shape[1])
        if call.full or level is None or level.cells is None or torch.compiler.is_compiling():
            return None
        if level.downsample == call.attention_level:
            return None  # a block without its attention tells nothing of it
        judged = judged_removal(level)
        states = (hidden_states.shape, hidden_states.dtype, hidden_states.device)
        attention = self.attention_of(block)
        kind = (*states, type(block), attention.heads, kernel_of(attention), level.height, judged)
        if kind not in self.decisions:
            with _MEASURING:
                self.decisions[kind] = self._measure(gate, call, block, args, kwargs, judged)
        decision = self.decisions[kind]
        return None if decision.pays else Reason(Why.does_not_pay, (decision,))

    def _measure(
        self, gate: Gate, call: Call, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], judged: int
    ) -> Decision:
        """Run a block both ways, with so many tokens removed in the one, unless the gate knows the result."""
        hidden_states = argument(self._places, args, kwargs, "hidden_states")
        level = call.levels[hidden_states.shape[1]]
        levels = call.levels | {hidden_states.shape[1]: replace(level, removed=judged, ratio=None)}

        @torch.no_grad()
        def run(decision: Reason | None) -> None:
            trial = replace(call, levels=levels, plans={}, too_few={}, record=None, ran=set(), trial=decision)
            with self._instead(trial):
                inputs, keywords = self.enter(block, args, kwargs) or (args, kwargs)
                self.leave(block, inputs, block.forward(*inputs, **keywords))

        key = kind_of_block(self.attention_of(block), hidden_states, level, judged, self.decider.config)
        key += self.more_of_kind(call, block)
        off = Reason(Why.does_not_pay, ("measuring",))
        return gate.decide(key, hidden_states.device, lambda: run(off), lambda: run(None))

    @contextmanager
    def _instead(self, call: Call) -> Iterator[None]:
        """Let a call of the gate's own be this thread's for a while."""
        current = self.decider.current
        before = current.call, current.block
        current.call, current.block = call, BlockState()
        try:
            yield
        finally:
            current.call, current.block = before


class LayerHooks:
    """The hooks around a block's cross-attention or MLP.

    Args:
        decider: Of the model.
        role: Which of the two.
    """

    def __init__(self, decider: Decider, role: Layer) -> None:
        self.decider = decider
        self.role = role

    def merge_input(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the layer: merge its input by the block's plan."""
        hidden_states = first(args, kwargs, "hidden_states")
        obstacle = Reason(Why.places) if kwargs.get("ip_adapter_masks") is not None else None
        self.decider.current.block.layer = answer = self.decider.ask(layer, self.role, hidden_states, obstacle)
        if not isinstance(answer, Merge):
            return None
        return with_first(args, kwargs, "hidden_states", answer.merge(hidden_states))

    def unmerge_output(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After it: bring the output back to the block's tokens."""
        block = self.decider.current.block
        answer, block.layer = block.layer, None
        if isinstance(answer, Merge):
            return answer.unmerge(output)
        if isinstance(answer, Leave):
            answer.done(output)
        return None


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, BasicTransformerBlock) and not attends_over_frames(name)
    ]
