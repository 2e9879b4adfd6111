"""What merging does around transformer blocks: the hooks on blocks and on the layers inside them."""

from copy import copy
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from tomesd_plus.matching import MergePlan
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.detail import WHOLE_STEP
from tomesd_plus.merging.gate import Decision, Gate
from tomesd_plus.merging.levels import Level
from tomesd_plus.schedules import AdaptiveRatio

if TYPE_CHECKING:
    from tomesd_plus.merging.attachment import TokenMerger


class BlockMerging:
    """The hooks on a model's transformer blocks; they copy and pickle.

    Args:
        merger: The merger of the model.
    """

    plan: MergePlan | None  # that of the block under way
    inside: bool  # True if all layers of the block under way run on merged tokens
    declined: Decision | None  # why the block under way is left alone
    measuring: bool  # while the gate runs a block
    _merged_layer: nn.Module | None  # between its pre-hook and its hook
    _entered: tuple[Tensor, Tensor | None] | None  # a block's input before and after merging, if it is merged
    decisions: dict[tuple[Any, ...], Decision]  # the gate's, by input's shape, …, number of tokens removed

    def __init__(self, merger: "TokenMerger") -> None:
        self.merger = merger
        config = merger.config
        self.gate = None if config.levels == "all" else Gate(refresh=config.levels == "remeasure")
        self.decisions = {}
        self.reset()

    def attach(self, model: nn.Module) -> list[Any]:
        """Put the hooks that the configuration needs on a model; returns their handles."""
        config, handles = self.merger.config, []
        around = config.merge_cross_attention or config.merge_mlp
        if config.metric != "block_input" and not around and self.gate is None:
            return []
        for block in model.modules():
            if not isinstance(block, BasicTransformerBlock):
                continue
            handles.append(block.register_forward_pre_hook(self.enter, with_kwargs=True))
            if config.merge_block:
                handles.append(block.register_forward_hook(self.leave))
                continue
            layers = [block.attn2] if config.merge_cross_attention and block.attn2 is not None else []
            for layer in [*layers, block.ff] if config.merge_mlp else layers:
                handles.append(layer.register_forward_pre_hook(self.merge_input, with_kwargs=True))
                handles.append(layer.register_forward_hook(self.unmerge_output))
        return handles

    def enter(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a block: forget the last one's plan; match on the raw input, and merge it, if so wanted."""
        merger, config = self.merger, self.merger.config
        self.plan, self.inside, self._entered = None, False, None
        if self.gate is not None and not self.measuring:
            self.declined = self._measured(self.gate, block, args, kwargs)
        if config.metric != "block_input" or not merger.active:
            return None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.plan = merger.plan(hidden_states, block)
        if not config.merge_block:
            return None
        reason = self._why_not_whole(block, args, kwargs)
        if self.plan is None or reason is not None:
            merger.record(block, hidden_states.shape[1], 0, reason or merger.reason(hidden_states.shape[1], block))
            self.plan = None
            self._entered = (hidden_states, None) if reason is None and merger.details.whole else None
            return None
        merger.record(block, hidden_states.shape[1], self.plan.removed)
        merged = self.plan.merge(hidden_states, config.mode)
        self.inside, self._entered = True, (hidden_states, merged)
        return ((merged, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": merged})

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After it: what the block has added to a merged token is added to all tokens that it stands for."""
        if self._entered is None:
            return None
        hidden_states, merged = self._entered
        plan, self.plan, self.inside, self._entered = self.plan, None, False, None
        if plan is None or merged is None:
            self.merger.keep_detail(block, output - hidden_states)
            return None
        return hidden_states + self.merger.details.unmerge(block, plan, output - merged)

    def merge_input(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before cross-attention or MLP: merge the input by the block's plan."""
        plan = None if self.merger.details.whole else self.plan  # on whole steps self-attention alone may be merged
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if plan is None or not plan.fits(hidden_states) or kwargs.get("ip_adapter_masks") is not None:
            reason = "its block's attention was not merged" if plan is None else "its input is not the block's tokens"
            if self.declined is not None:
                reason = str(self.declined)
            if self.merger.details.whole and self.merger.merges_at(hidden_states.shape[1]):
                reason = WHOLE_STEP
            if kwargs.get("ip_adapter_masks") is not None:
                reason = "it looks at places in the picture"
            self.merger.record(layer, hidden_states.shape[1], 0, reason)
            return None
        self._merged_layer = layer
        self.merger.record(layer, plan.tokens, plan.removed)
        hidden_states = plan.merge(hidden_states, self.merger.config.mode)
        return ((hidden_states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_states})

    def unmerge_output(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After it: bring the output back to the block's tokens."""
        if self._merged_layer is not layer or self.plan is None:
            self.merger.keep_detail(layer, output)
            return None
        self._merged_layer = None
        return self.merger.details.unmerge(layer, self.plan, output)

    def _measured(self, gate: Gate, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Decision | None:
        """Measure a block both ways, unless that was done before; the decision if merging does not pay."""
        merger = self.merger
        hidden_states = args[0] if args else kwargs["hidden_states"]
        level = merger.levels.get(hidden_states.shape[1])
        if not merger.active or merger.details.whole or level is None or level.cells is None:
            return None
        if torch.compiler.is_compiling():
            return None
        judged = _judged(level)
        states = (hidden_states.shape, hidden_states.dtype, hidden_states.device)
        kind = (*states, block.attn1.heads, _kernel_of(block.attn1), level.height, judged)
        if kind not in self.decisions:
            self.decisions[kind] = self._measure(gate, block, args, kwargs, judged)
        decision = self.decisions[kind]
        return None if decision.pays else decision

    def _measure(self, gate: Gate, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], judged: int) -> Decision:
        """Run a block both ways, with so many tokens removed in the one, unless the gate knows the result."""
        merger = self.merger
        hidden_states = args[0] if args else kwargs["hidden_states"]
        tokens = hidden_states.shape[1]
        level = merger.levels[tokens]

        @torch.no_grad()
        def run(declined: Decision | None) -> None:
            self.declined = declined
            merger.planner.forget()
            inputs, keywords = self.enter(block, args, kwargs) or (args, kwargs)
            output = block.forward(*inputs, **keywords)
            if merger.config.merge_block:
                self.leave(block, inputs, output)

        planner, levels, self.measuring = merger.planner, merger.levels, True
        merger.planner = copy(planner)
        merger.levels = levels | {tokens: replace(level, removed=judged, ratio=None)}
        try:
            key = _kind_of(block, hidden_states, level, judged, merger.config)
            return gate.decide(key, hidden_states.device, lambda: run(_CLOSED), lambda: run(None))
        finally:
            self.reset()
            merger.planner, merger.levels = planner, levels

    def _why_not_whole(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why a block cannot run on merged tokens as a whole, or ``None``."""
        if (args[1] if len(args) > 1 else kwargs.get("attention_mask")) is not None:
            return "it has an attention mask"
        extra = (args[5] if len(args) > 5 else kwargs.get("cross_attention_kwargs")) or {}
        if extra.get("gligen") is not None or extra.get("ip_adapter_masks") is not None:
            return "it looks at places in the picture"
        if getattr(block.attn1.processor, "merger", None) is not self.merger:
            return "its self-attention is left alone"
        return None

    def reset(self) -> None:
        """Forget the block under way."""
        self.plan = None
        self.inside = False
        self.declined = None
        self.measuring = False
        self._merged_layer = None
        self._entered = None

    def __getstate__(self) -> dict[str, Any]:
        nothing = dict.fromkeys(("plan", "declined", "_merged_layer", "_entered"))
        return {**self.__dict__, **nothing, "inside": False, "measuring": False, "decisions": {}}


_CLOSED = Decision(0.0, 0.0)


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


def _kind_of(block: Any, hidden_states: Tensor, level: Level, judged: int, config: ToMeConfig) -> str:
    """All that the time of a transformer block depends on, but for machine and versions."""
    batch, _, channels = hidden_states.shape
    options = asdict(config) | {"whole_every": config.whole_every is not None}  # what details are kept for takes time
    for name in ("ratio", "cached_ratio", "skipped_ratio", "schedule", "more_at", "max_downsample", "levels", "seed",
                 "plan_per", "plan_every", "reuse_attention"):  # fmt: skip
        del options[name]
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
