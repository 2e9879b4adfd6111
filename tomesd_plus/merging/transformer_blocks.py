"""The hooks on the blocks of transformers: on each, or on the first and the last of a run that is merged as one."""

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn

from tomesd_plus.host.arguments import argument, positions
from tomesd_plus.host.transformers import blocks_of
from tomesd_plus.merging.answers import Leave, Merge, Reason, Why
from tomesd_plus.merging.blocks import BlockHooks, LayerHooks
from tomesd_plus.merging.config import Layer, ToMeConfig
from tomesd_plus.merging.decider import Decider
from tomesd_plus.merging.generation import Call
from tomesd_plus.merging.joint import JointToMeProcessor, why_not_merged


class TransformerBlockHooks(BlockHooks):
    """The hooks on a transformer's blocks; they copy and pickle.

    Args:
        decider: Of the model.
    """

    def __init__(self, decider: Decider) -> None:
        super().__init__(decider)
        self._runs: dict[nn.Module, list[nn.Module]] = {}  # the blocks of a run, by its first

    def attach(self, model: nn.Module) -> list[Any]:
        config, handles = self.decider.config, []
        blocks = list(blocks_of(model).values())
        size = len(blocks) if config.blocks_per_run == "all" else config.blocks_per_run
        runs = [blocks[first : first + size] for first in range(0, len(blocks), size)]
        self._runs = {run[0]: run for run in runs} if size > 1 else {}
        self._places = positions(type(blocks[0]))
        for run in runs:
            handles.append(run[0].register_forward_pre_hook(self.enter, with_kwargs=True))
            if config.metric == "block_input":
                handles.append(run[-1].register_forward_hook(self.leave))
        if config.layers == "block":
            return handles
        for block in blocks:
            if merges_as_pair(block, self.decider.config):
                pair = PairHooks(self.decider)
                self.decider.names[block.norm] = self.decider.names[block]  # type: ignore[index]
                handles.append(block.norm.register_forward_hook(pair.merge_input))  # type: ignore[union-attr]
                handles.append(block.proj_out.register_forward_hook(pair.unmerge_output))  # type: ignore[union-attr]
            for role, layer in _inner_layers(block, self.decider).items():
                hooks = LayerHooks(self.decider, role)
                handles.append(layer.register_forward_pre_hook(hooks.merge_input, with_kwargs=True))
                handles.append(layer.register_forward_hook(hooks.unmerge_output))
        return handles

    def layers(self, model: nn.Module) -> list[nn.Module]:
        blocks = list(blocks_of(model).values())
        if self.decider.config.layers == "block":
            return blocks
        pairs: list[Any] = [block.norm for block in blocks if merges_as_pair(block, self.decider.config)]
        return [*pairs, *(layer for block in blocks for layer in _inner_layers(block, self.decider).values())]

    def enter(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        changed = super().enter(block, args, kwargs)
        call = self.decider.call()
        if call is not None and merges_as_pair(block, self.decider.config):
            self.decider.current.block.obstacle = self._obstacle(call, block, args, kwargs)
        return changed

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return super().leave(block, args, output)
        text, image = output
        changed = super().leave(block, args, image)
        return None if changed is None else (text, changed)

    def attention_of(self, block: Any) -> Any:
        return _attentions(block)[0]

    def more_of_kind(self, call: Call, block: nn.Module) -> str:
        return f" {type(block).__name__}, {call.text_tokens} text tokens"

    def _obstacle(self, call: Call, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reason | None:
        """Why a block, or the run that begins with it, cannot run on merged tokens as a whole, or ``None``."""
        run = self._runs[block] if self._runs else [block]
        if len(run) > 1 and call.between is not None:
            return call.between
        if argument(self._places, args, kwargs, "attention_mask") is not None:
            return Reason(Why.mask)
        more = argument(self._places, args, kwargs, "joint_attention_kwargs")
        more = more or argument(self._places, args, kwargs, "cross_attention_kwargs") or {}
        given = {name: value for name, value in more.items() if value is not None}
        for attention in (attention for each in run for attention in _attentions(each)):
            processor = attention.processor
            if getattr(getattr(processor, "attachment", None), "decider", None) is not self.decider:
                return Reason(Why.attention_left_alone)
            if isinstance(processor, JointToMeProcessor):
                reason = why_not_merged(attention, given)
                if reason is not None:
                    return reason
        return Reason(Why.own_arguments, (", ".join(sorted(given)),)) if given else None


class PairHooks:
    """The hooks on a block whose attention and MLP run side by side: between its norm and its last projection.

    Args:
        decider: Of the model.
    """

    def __init__(self, decider: Decider) -> None:
        self.decider = decider

    def merge_input(self, norm: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> Any:
        """After the norm: merge what both are given."""
        call, block = self.decider.call(), self.decider.current.block
        if call is None:
            return None
        hidden_states, gate = output
        text, image = hidden_states[:, : call.text_tokens], hidden_states[:, call.text_tokens :]
        answer = self.decider.ask(norm, "self_attention", image, block.obstacle)
        block.pair = answer if isinstance(answer, (Merge, Leave)) else None
        if not isinstance(answer, Merge):
            return None
        return torch.cat([text, answer.merge(image)], dim=1), gate

    def unmerge_output(self, projection: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After the projection of both: bring the output back to the block's tokens."""
        call, block = self.decider.call(), self.decider.current.block
        pair, block.pair = block.pair, None
        if call is None or pair is None:
            return None
        text, image = output[:, : call.text_tokens], output[:, call.text_tokens :]
        if isinstance(pair, Merge):
            return torch.cat([text, pair.unmerge(image)], dim=1)
        pair.done(image)
        return None


def merges_as_pair(block: nn.Module, config: ToMeConfig) -> bool:
    """True if a block's attention and MLP run side by side, and both are merged."""
    both = {"self_attention", "mlp"} <= set(config.layers) and config.layers != "block"
    alike = config.sides == "both" and config.metric != "keys"
    return isinstance(block, FluxSingleTransformerBlock) and both and alike


def _inner_layers(block: Any, decider: Decider) -> dict[Layer, nn.Module]:
    """The layers of a block that run on merged tokens beside its self-attention, by role."""
    inner: dict[Layer, str] = {"cross_attention": "attn2", "mlp": "ff"}
    if not isinstance(block, BasicTransformerBlock):
        del inner["cross_attention"]  # the second attention of Stable Diffusion 3.5 is of the image's tokens
    found = {role: getattr(block, name, None) for role, name in inner.items() if role in decider.config.layers}
    return {role: layer for role, layer in found.items() if layer is not None}


def _attentions(block: Any) -> list[Any]:
    """A block's attention layers among the image's own tokens."""
    if isinstance(block, BasicTransformerBlock):
        return [block.attn1]
    second = getattr(block, "attn2", None)
    return [block.attn] if second is None else [block.attn, second]
