"""The ideal for transformers: blocks and layers that run on fewer image tokens, at no cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from tomesd_plus.host.arguments import argument, positions, with_first
from tomesd_plus.host.joint_attention import Rotary
from tomesd_plus.host.transformers import blocks_of
from tomesd_plus.matching import max_removed
from tomesd_plus.merging.config import ToMeConfig

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module's call."""


@contextmanager
def fewer_image_tokens(model: nn.Module, config: ToMeConfig, rows: int, columns: int) -> Iterator[None]:
    """Run what a configuration merges in a transformer on the reduced number of tokens, inside a ``with`` block.

    As :func:`~tomesd_plus.benchmark.ideal.fewer_tokens` does for UNets: the first tokens stand for the merged ones,
    and zeros for the outputs.

    Args:
        model: A transformer of PixArt, Stable Diffusion 3 or Flux.
        config: Layers and the ratio, which must be the same at every step.
        rows, columns: Of the grid of image tokens.

    Raises:
        ValueError: One side of attention alone is merged, for which there is no ideal here.
    """
    if config.sides != "both":
        raise ValueError(f"there is no ideal of transformers with sides={config.sides!r}")
    tokens = rows * columns
    schedule = config.schedules.get(1)
    ratio = 0.0 if schedule is None else max(schedule.ratios)
    removed = min(int(tokens * ratio), max_removed(rows, columns, config.cell_size))
    cut = _Cut(tokens, tokens - removed)
    handles: list[Any] = []
    blocks = list(blocks_of(model).values())
    size = len(blocks) if config.blocks_per_run == "all" else config.blocks_per_run
    try:
        for index, block in enumerate(blocks):
            if config.layers == "block":
                handles.append(block.register_forward_pre_hook(cut.rotary, with_kwargs=True))
                if index % size == 0:
                    handles.append(block.register_forward_pre_hook(cut.image, with_kwargs=True))
                if index % size == size - 1 or block is blocks[-1]:
                    handles.append(block.register_forward_hook(cut.padded, with_kwargs=True))
            else:
                handles += _inner(block, config, cut, isinstance(model, PixArtTransformer2DModel))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inner(block: Any, config: ToMeConfig, cut: "_Cut", pixart: bool) -> list[Any]:
    """The hooks on a block's layers."""
    single = hasattr(block, "proj_mlp")
    attentions = [block.attn1] if pixart else [block.attn, getattr(block, "attn2", None)]
    layers = attentions if "self_attention" in config.layers else []
    layers += [block.attn2] if pixart and "cross_attention" in config.layers else []
    layers += [block.ff] if not single and "mlp" in config.layers else []
    if single and {"self_attention", "mlp"} <= set(config.layers):
        return [
            block.norm.register_forward_hook(cut.normed),
            block.attn.register_forward_pre_hook(cut.rotary, with_kwargs=True),
            block.proj_out.register_forward_hook(cut.projected),
        ]
    handles: list[Any] = []
    for layer in layers:
        if layer is not None:
            handles.append(layer.register_forward_pre_hook(cut.rotary, with_kwargs=True))
            handles.append(layer.register_forward_pre_hook(cut.image, with_kwargs=True))
            handles.append(layer.register_forward_hook(cut.padded, with_kwargs=True))
    return handles


@dataclass(eq=False)
class _Cut:
    """Hooks that leave the first image tokens of a sequence, and fill its output up again.

    Args:
        tokens: Image tokens.
        kept: How many of them stay.
    """

    tokens: int
    kept: int

    def __post_init__(self) -> None:
        self._zeros: dict[tuple[Any, ...], Tensor] = {}

    @property
    def removed(self) -> int:
        return self.tokens - self.kept

    def rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Before a block or an attention layer: fewer rotary embeddings."""
        given: Rotary | None = kwargs.get("image_rotary_emb")
        if given is None:
            return None
        return args, kwargs | {"image_rotary_emb": tuple(each[: len(each) - self.removed] for each in given)}

    def image(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Before a block or layer: fewer tokens; after the text where the sequence has both."""
        hidden_states = argument(positions(type(module)) | {"hidden_states": 0}, args, kwargs, "hidden_states")
        return with_first(args, kwargs, "hidden_states", hidden_states[:, : hidden_states.shape[1] - self.removed])

    def padded(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After it: a tensor of zeros in place of the shortened output; of two, blocks give the image's last."""
        if not isinstance(output, tuple):
            return self._zero(output)
        if hasattr(module, "to_q"):
            return self._zero(output[0]), output[1]
        return output[0], self._zero(output[1])

    def normed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the norm of a block whose attention and MLP run side by side."""
        return output[0][:, : output[0].shape[1] - self.removed], *output[1:]

    def projected(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """After its last projection."""
        return self._zero(output)

    def _zero(self, output: Tensor) -> Tensor:
        shape = output.shape[0], output.shape[1] + self.removed, output.shape[2]
        key = (*shape, output.dtype, output.device)
        if key not in self._zeros:
            self._zeros[key] = torch.zeros(shape, dtype=output.dtype, device=output.device)
        return self._zeros[key]
