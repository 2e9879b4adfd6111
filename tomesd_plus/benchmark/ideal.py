"""The ideal: layers that run on fewer tokens, without the time of matching, merging and unmerging."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from tomesd_plus.host.arguments import first, with_first
from tomesd_plus.matching import max_removed
from tomesd_plus.merging.config import ToMeConfig

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a layer's call."""


@contextmanager
def fewer_tokens(unet: nn.Module, config: ToMeConfig, height: int, width: int) -> Iterator[None]:
    """Run the layers that a configuration merges on the reduced number of tokens, inside a ``with`` block.

    Each layer gets a view of its first tokens; a preallocated tensor of zeros for all tokens replaces its output. The
    result is meaningless, but its time is the lower bound for merging these layers at this ratio. Not for
    ``torch.compile``, which would remove layers whose output is not used.

    Args:
        unet: The UNet.
        config: Layers, levels and the ratio, which must be the same at every step.
        height, width: Size of the latents.
    """
    kept, zeros = _kept(config, height, width), _Zeros()
    handles: list[Any] = []
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            for layer, fewer in _hooks(block, config, kept, zeros):
                handles.append(layer.register_forward_pre_hook(fewer.before, with_kwargs=True))
                handles.append(layer.register_forward_hook(fewer.after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept(config: ToMeConfig, height: int, width: int) -> dict[int, int]:
    """The number of tokens kept, by the number of tokens, where any are removed."""
    kept = {}
    for downsample, schedule in config.schedules.items():
        rows, columns = -(-height // downsample), -(-width // downsample)
        tokens = rows * columns
        removed = min(int(tokens * max(schedule.ratios)), max_removed(rows, columns, config.cell_size))
        if removed:
            kept[tokens] = tokens - removed
    return kept


def _hooks(
    block: Any, config: ToMeConfig, kept: dict[int, int], zeros: "_Zeros"
) -> Iterator[tuple[nn.Module, "_Fewer"]]:
    """The merged layers of a block, each with its hooks."""
    if config.layers == "block":
        yield block, _Fewer(kept, zeros)
        return
    if "self_attention" in config.layers:
        kinds = {"both": _Fewer, "keys_values": _FewerKeys, "queries": _FewerQueries}
        yield block.attn1, kinds[config.sides](kept, zeros)
    if "cross_attention" in config.layers and block.attn2 is not None:
        yield block.attn2, _Fewer(kept, zeros)
    if "mlp" in config.layers:
        yield block.ff, _Fewer(kept, zeros)


class _Zeros:
    """A shared, read-only tensor of zeros for each shape and dtype."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def like(self, output: Tensor, tokens: int) -> Tensor:
        shape = torch.Size((output.shape[0], tokens, output.shape[2]))
        key = (shape, output.dtype)
        if key not in self.tensors:
            self.tensors[key] = output.new_zeros(shape)
        return self.tensors[key]


class _Fewer:
    """The hooks around one layer.

    Args:
        kept: The number of tokens kept, by the number of tokens.
        zeros: Source of the tensors that replace the output.
    """

    def __init__(self, kept: dict[int, int], zeros: _Zeros) -> None:
        self.kept = kept
        self.zeros = zeros
        self.tokens = 0

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        hidden_states = first(args, kwargs, "hidden_states")  # (batch, tokens, channels)
        self.tokens = hidden_states.shape[1]
        fewer = hidden_states[:, : self.kept.get(self.tokens, self.tokens)]
        return self.call(args, kwargs, hidden_states, fewer)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], full: Tensor, fewer: Tensor) -> Call:
        """The layer's call with fewer tokens in place of the full ones."""
        return with_first(args, kwargs, "hidden_states", fewer)

    def after(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if output.shape[1] == self.tokens else self.zeros.like(output, self.tokens)


class _FewerQueries(_Fewer):
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], full: Tensor, fewer: Tensor) -> Call:
        return super().call(args, kwargs | {"encoder_hidden_states": full}, full, fewer)


class _FewerKeys(_Fewer):
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], full: Tensor, fewer: Tensor) -> Call:
        return args, kwargs | {"encoder_hidden_states": fewer}
