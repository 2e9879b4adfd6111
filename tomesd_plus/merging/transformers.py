"""Merging in transformers: which of their layers, and by whose plans."""

import re
from collections.abc import Mapping
from typing import Any

from diffusers import PixArtTransformer2DModel
from torch import nn

from tomesd_plus.host.denoisers import noise_levels_of, reader_of
from tomesd_plus.host.joint_attention import is_known
from tomesd_plus.host.say import warn
from tomesd_plus.host.transformers import blocks_of
from tomesd_plus.merging.answers import Reason, Why
from tomesd_plus.merging.attachment import Attachment
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.joint import JointToMeProcessor, TransformerProcessor
from tomesd_plus.merging.planner import Planner
from tomesd_plus.merging.transformer_blocks import TransformerBlockHooks, merges_as_pair
from tomesd_plus.merging.wrapping import left_alone

BLOCKS_PER_STAGE = 4
"""How many consecutive blocks share a plan, with ``plan_per="stage"``."""


class TransformerPlanner(Planner):
    """Blocks of a transformer, which are all of one resolution, share plans by their place in it."""

    def attach(self, names: Mapping[nn.Module, str]) -> None:
        """Learn the names of a model's modules."""
        self.stages = {}
        for module, name in names.items():
            found = re.match(r"((?:\w+_)?transformer_blocks)\.(\d+)", name)
            if found is not None:
                index = int(found[2]) // (1 if self.config.plan_per == "block" else BLOCKS_PER_STAGE)
                self.stages[module] = f"{found[1]}.{index}"

    def _shared_by(self, layer: nn.Module) -> nn.Module | str | None:
        return None if self.config.plan_per == "level" else self.stages.get(layer, layer)


def check_transformer(model: nn.Module, config: ToMeConfig) -> None:
    """Raise ValueError if a configuration asks for what a transformer does not have."""
    if not isinstance(model, PixArtTransformer2DModel) and "cross_attention" in config.layers:
        raise ValueError(
            f"the blocks of {type(model).__name__} attend to text and image at once: give layers 'self_attention', "
            "'mlp' or both, or 'block'"
        )
    if config.of_cached_steps:
        raise ValueError(
            f"{' and '.join(config.of_cached_steps)} need cached steps, which run the outer layers of a UNet: the "
            "steps of a transformer run in full, or not at all"
        )


def merge_transformer(pipe: Any, model: nn.Module, config: ToMeConfig, excluded: dict[str, Reason]) -> Attachment:
    """Put processors and an attachment on a transformer.

    Args:
        pipe: The pipeline, or the transformer by itself.
        model: The transformer.
        config: What to merge.
        excluded: What is left alone beside it, and why; for the report.
    """
    merging: list[Any] = []
    excluded = dict(excluded)
    plain = isinstance(model, PixArtTransformer2DModel)
    for name, block in blocks_of(model).items():
        for layer_name, layer in block.named_children():
            processor = getattr(layer, "processor", None)
            if processor is None or getattr(layer, "is_cross_attention", False):
                continue
            reason = _why_excluded(processor, plain)
            if reason is None:
                merging.append(layer)
            else:
                excluded[f"{name}.{layer_name}"] = reason
        if "mlp" in config.layers and hasattr(block, "proj_mlp") and not merges_as_pair(block, config):
            excluded[f"{name}.proj_mlp"] = Reason(Why.beside)
    attachment = Attachment(
        config,
        noise_levels_of(pipe, config.follows_noise_level),
        excluded=excluded,
        plans=TransformerPlanner(config),
        stays=True,
        read=reader_of(pipe),
        blocks=TransformerBlockHooks,
    )
    if not merging:
        words = "; ".join(sorted({str(why) for why in excluded.values()}))
        warn(f"Token merging does nothing to transformer: no attention layer can be merged: {words}.", stacklevel=4)
        attachment.record.value = left_alone(excluded)
        return attachment
    for layer in merging:
        kind = TransformerProcessor if plain else JointToMeProcessor
        layer.set_processor(kind(layer.processor, attachment))
    attachment.attach(model, merging)
    return attachment


def _why_excluded(processor: Any, plain: bool) -> Reason | None:
    """Why no processor can be put around a layer's own, or ``None``."""
    if isinstance(processor, nn.Module):
        return Reason(Why.module_processor)
    if not plain and not is_known(processor):
        return Reason(Why.unknown_processor, (type(processor).__name__,))
    return None
