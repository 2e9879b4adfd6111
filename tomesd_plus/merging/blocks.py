"""The hooks on transformer blocks and on the layers inside them, and the gate's measurements of blocks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tomesd_plus.host.arguments import argument, first, positions, with_first
from tomesd_plus.host.transient import Transient, TransientDict
from tomesd_plus.merging.answers import Leave, Merge, Reason, Why
from tomesd_plus.merging.config import Layer, ToMeConfig
from tomesd_plus.merging.decider import Decider
from tomesd_plus.merging.gate import Decision, Gate
from tomesd_plus.merging.generation import BlockState, Call, Level
from tomesd_plus.schedules import AdaptiveRatio

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
        call.block = BlockState()
        if self.gate is not None:
            call.block.declined = self._declined(self.gate, call, block, args, kwargs)
        if self.decider.config.metric != "block_input":
            return None
        obstacle = self._obstacle(block, args, kwargs) if self.decider.config.layers == "block" else None
        answer = self.decider.ask(block, "block", hidden_states, obstacle)
        merged = answer.merge(hidden_states) if isinstance(answer, Merge) else None
        call.block.entered = (answer, hidden_states, merged)
        return None if merged is None else with_first(args, kwargs, "hidden_states", merged)

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After it: what the block has added to a merged token is added to all tokens that it stands for."""
        call = self.decider.call()
        if call is None or call.block.entered is None:
            return None
        answer, hidden_states, merged = call.block.entered
        call.block = BlockState()
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
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        current = self.decider.current
        if self._calls.value is None:
            self._calls.value = WeakTensorKeyDictionary()
        if current.call is not None and current.call.running:
            self._calls.value[hidden_states] = current.call
        else:
            # Re-entrant checkpointing gives it copies: then the latest call, in whatever thread, is the likeliest.
            current.call = self._calls.value.get(hidden_states, current.call) or self.decider.latest.value

    def _obstacle(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reason | None:
        """Why a block cannot run on merged tokens as a whole, or ``None``."""
        if argument(self._places, args, kwargs, "attention_mask") is not None:
            return Reason(Why.mask)
        extra = argument(self._places, args, kwargs, "cross_attention_kwargs") or {}
        if extra.get("gligen") is not None or extra.get("ip_adapter_masks") is not None:
            return Reason(Why.places)
        if getattr(getattr(block.attn1.processor, "attachment", None), "decider", None) is not self.decider:
            return Reason(Why.attention_left_alone)
        return None

    # The gate ---------------------------------------------------------------------------------------------------

    def _declined(
        self, gate: Gate, call: Call, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Reason | None:
        """Why merging is left off in a block; it is measured both ways, unless that was done before."""
        if call.trial is not None:
            return call.trial.declined
        hidden_states = argument(self._places, args, kwargs, "hidden_states")
        level = call.levels.get(hidden_states.shape[1])
        if call.full or level is None or level.cells is None or torch.compiler.is_compiling():
            return None
        judged = _judged(level)
        states = (hidden_states.shape, hidden_states.dtype, hidden_states.device)
        kind = (*states, block.attn1.heads, _kernel_of(block.attn1), level.height, judged)
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
        def run(declined: Reason | None) -> None:
            trial = replace(
                call, levels=levels, plans={}, too_few={}, record=None, ran=set(), trial=BlockState(declined=declined)
            )
            with self._instead(trial):
                inputs, keywords = self.enter(block, args, kwargs) or (args, kwargs)
                self.leave(block, inputs, block.forward(*inputs, **keywords))

        key = _kind_of(block, hidden_states, level, judged, self.decider.config)
        off = Reason(Why.does_not_pay, ("measuring",))
        return gate.decide(key, hidden_states.device, lambda: run(off), lambda: run(None))

    @contextmanager
    def _instead(self, call: Call) -> Iterator[None]:
        """Let a call of the gate's own be this thread's for a while."""
        current, before = self.decider.current, self.decider.current.call
        current.call = call
        try:
            yield
        finally:
            current.call = before


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
        call = self.decider.call()
        if call is None:
            return None
        hidden_states = first(args, kwargs, "hidden_states")
        obstacle = Reason(Why.places) if kwargs.get("ip_adapter_masks") is not None else None
        call.block.layer = answer = self.decider.ask(layer, self.role, hidden_states, obstacle)
        if not isinstance(answer, Merge):
            return None
        return with_first(args, kwargs, "hidden_states", answer.merge(hidden_states))

    def unmerge_output(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After it: bring the output back to the block's tokens."""
        call = self.decider.call()
        if call is None:
            return None
        answer, call.block.layer = call.block.layer, None
        if isinstance(answer, Merge):
            return answer.unmerge(output)
        if isinstance(answer, Leave):
            answer.done(output)
        return None


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BasicTransformerBlock)]


def _judged(level: Level) -> int:
    """For which number of removed tokens a level is measured, so that a smooth schedule is not measured at each step.

    Ratios are rounded down, to eighths, and below that to powers of two; an adaptive one counts as its smallest, which
    pays least.
    """
    removed, tokens = level.removed, level.height * level.width
    if isinstance(level.ratio, AdaptiveRatio):
        removed = min(count for ratio in level.ratio.ratios if (count := min(int(ratio * tokens), removed)))
    eighths = 8 * removed // tokens
    return eighths * tokens // 8 if eighths else 1 << (removed.bit_length() - 1)


# What the time of a block does not depend on, or what stands in the key by itself.
_NOT_OF_TIME = ("ratio", "cached_ratio", "max_downsample", "gate", "seed", "plan_per", "plan_every")


def _kind_of(block: Any, hidden_states: Tensor, level: Level, judged: int, config: ToMeConfig) -> str:
    """All that the time of a transformer block depends on, but for machine and versions."""
    batch, _, channels = hidden_states.shape
    options = {name: value for name, value in asdict(config).items() if name not in _NOT_OF_TIME}
    options["full_steps"] = config.full_steps is not None  # what details are kept for takes time
    return (
        f"{channels} channels, {block.attn1.heads} heads, {_kernel_of(block.attn1)}, "
        f"{level.height} × {level.width} tokens, batch {batch}, "
        f"{hidden_states.dtype}, {hidden_states.device.type}, {judged} removed, {options}"
    )


def _kernel_of(attention: Any) -> str:
    """What computes an attention layer."""
    processor = attention.processor
    inner, backend = type(getattr(processor, "inner", processor)), getattr(processor, "_attention_backend", None)
    return inner.__name__ if backend is None else f"{inner.__name__} on {backend}"
