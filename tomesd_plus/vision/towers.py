"""Where transformers' vision towers have what merging needs: layers, norms, keys, patches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from tomesd_plus.vision.versions import OLDEST


@dataclass(frozen=True)
class Family:
    """How the layers of one family are made.

    Args:
        attention: The attention's name in a layer.
        norm: The name of the norm before the MLP.
        prefix: Tokens before the patches, without registers: class and distillation tokens.
    """

    attention: str
    norm: str
    prefix: int


FAMILIES = {
    "ViTLayer": Family("attention", "layernorm_after", 1),
    "DeiTLayer": Family("attention", "layernorm_after", 2),
    "CLIPEncoderLayer": Family("self_attn", "layer_norm2", 1),
    "SiglipEncoderLayer": Family("self_attn", "layer_norm2", 0),
    "Dinov2Layer": Family("attention", "norm2", 1),
    "Dinov2WithRegistersLayer": Family("attention", "norm2", 1),
    "DINOv3ViTLayer": Family("attention", "norm2", 1),
}
"""By the layer's class."""

SUPPORTED = "ViT, DeiT, CLIP, SigLIP, DINOv2 or DINOv3"


@dataclass(frozen=True)
class Tower:
    """A vision tower inside a model.

    Args:
        name: Of the tower in the model; empty if it is the model itself.
        family: How its layers are made.
        stack: The module that calls the layers one after the other.
        layers: By name, in order.
        patches: The convolution that makes patches.
        config: Of the tower.
    """

    name: str
    family: Family
    stack: nn.Module
    layers: dict[str, nn.Module]
    patches: nn.Module
    config: Any

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches."""
        return self.family.prefix + (getattr(self.config, "num_register_tokens", 0) or 0)

    def attention(self, layer: nn.Module) -> Any:
        """The attention of one of the layers."""
        return getattr(layer, self.family.attention)


def model_of(model_or_pipeline: Any) -> Any:
    """The model of a transformers pipeline, or the model itself, as it is without ``torch.compile`` around it."""
    model = model_or_pipeline
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        model = model.model
    return getattr(model, "_orig_mod", model)


def towers_of(model_or_pipeline: Any) -> list[Tower]:
    """The vision towers of a model or pipeline.

    Raises:
        TypeError: There is none, or its layers are made otherwise.
    """
    model = model_of(model_or_pipeline)
    found = list(_find(model)) if isinstance(model, nn.Module) else []
    if not found:
        raise TypeError(
            f"{type(model_or_pipeline).__name__} has no vision tower that can be merged: "
            f"expected transformers' {SUPPORTED}, bare, inside a model, or in a pipeline"
        )
    return found


def _find(model: nn.Module) -> Iterator[Tower]:
    modules = dict(model.named_modules())
    for name, layers in modules.items():
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            continue
        kind = type(layers[0])
        family = FAMILIES.get(kind.__name__) if kind.__module__.startswith("transformers.") else None
        if family is None:
            continue
        for index, layer in enumerate(layers):
            _check_parts(f"{name}.{index}", layer, family)
        config = getattr(layers[0], family.attention).config
        if not hasattr(config, "patch_size"):  # a text tower of the same class
            continue
        stack_name = name.rpartition(".")[0]
        tower_name = stack_name
        while not hasattr(modules[tower_name], "embeddings"):
            if not tower_name:
                break
            tower_name = tower_name.rpartition(".")[0]
        embeddings = getattr(modules[tower_name], "embeddings", None)
        patches = (
            next((each for each in embeddings.modules() if isinstance(each, nn.Conv2d)), None) if embeddings else None
        )
        if patches is not None:
            named = {f"{name}.{index}": layer for index, layer in enumerate(layers)}
            yield Tower(tower_name, family, modules[stack_name], named, patches, config)


def _check_parts(name: str, layer: nn.Module, family: Family) -> None:
    """Raise TypeError if a layer lacks a part that is hooked or read."""
    attention = getattr(layer, family.attention, None)
    parts = {f"{family.attention}.{part}": getattr(attention, part, None) for part in ("config", "head_dim", "k_proj")}
    parts |= {part: getattr(layer, part, None) for part in (family.norm, "mlp")}
    missing = [part for part, value in parts.items() if value is None]
    if missing:
        raise TypeError(
            f"{name} ({type(layer).__name__}) cannot be merged: expected the layer of transformers {OLDEST} or later, "
            f"but it has no {', '.join(missing)}"
        )
