"""Tiny random vision towers of every family, and the paper's forward pass written out."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

SIZE, PATCH, LAYERS = 32, 4, 4
PATCHES = (SIZE // PATCH) ** 2
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH,
}  # fmt: skip
KINDS = {  # prefix tokens; model, config, options
    "vit": (1, ViTModel, ViTConfig, {"intermediate_size": 64}),
    "deit": (2, DeiTModel, DeiTConfig, {"intermediate_size": 64}),
    "clip": (1, CLIPVisionModel, CLIPVisionConfig, {"intermediate_size": 64}),
    "siglip": (0, SiglipVisionModel, SiglipVisionConfig, {"intermediate_size": 64}),
    "dinov2": (1, Dinov2Model, Dinov2Config, {"layerscale_value": 0.5, "mlp_ratio": 2}),
    "dinov2 registers": (5, Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"layerscale_value": 0.5}),
    "dinov3": (4, DINOv3ViTModel, DINOv3ViTConfig, {"intermediate_size": 64, "num_register_tokens": 3}),
}
WITH_CLASS_TOKEN = [kind for kind, (prefix, *_) in KINDS.items() if prefix]
_made: dict[tuple[str, str], Any] = {}


def make_config(kind: str, **options: Any) -> Any:
    _, _, config, more = KINDS[kind]
    return config(**(SHAPE | more | options))


def make_tower(kind: str = "vit", attention: str = "sdpa", **options: Any) -> Any:
    """A fresh tower, whose weights are drawn alike for every family."""
    if options or (kind, attention) not in _made:
        torch.manual_seed(0)
        config = make_config(kind, **options)
        config._attn_implementation = attention
        model = KINDS[kind][1](config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.08)
        if options:
            return model
        _made[kind, attention] = model
    return copy.deepcopy(_made[kind, attention])


def pictures(batch: int = 2, height: int = SIZE, width: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def forward(model: Any, pixel_values: Tensor | None = None, **options: Any) -> Tensor:
    return model(pictures() if pixel_values is None else pixel_values, **options).last_hidden_state


def layers_of(model: Any) -> Any:
    inner = getattr(model, "vision_model", model)
    for names in (("layers",), ("encoder", "layers"), ("encoder", "layer"), ("model", "layer")):
        found = inner
        for name in names:
            found = getattr(found, name, None)
        if found is not None:
            return found
    raise AssertionError(type(model))


@torch.no_grad()
def papers_forward(model: Any, pixel_values: Tensor, removed: list[int], prefix: int, **options: Any) -> list[Tensor]:
    """Each layer's output at full length, by Bolya et al.'s block written out: arXiv:2210.09461, section 3."""
    before_layers: list[Any] = []
    layers = layers_of(model)
    handle = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: before_layers.append((args[0], kwargs)), with_kwargs=True
    )
    model(pixel_values, **options)
    handle.remove()
    x, kwargs = before_layers[0]
    rotary = kwargs.get("position_embeddings")
    batch, tokens, _ = x.shape
    size = x.new_ones(batch, tokens, 1)
    source = torch.eye(tokens).expand(batch, -1, -1)  # (batch, tokens now, tokens at first)
    place = torch.arange(tokens).expand(batch, -1)
    outputs = []
    for layer, r in zip(layers, removed, strict=True):
        y, metric = _attention(layer, x, size, None if rotary is None else _rotary(rotary, place, prefix))
        x = x + y
        merge, place = _bipartite_soft_matching(metric, r, prefix, place)
        x = merge(x * size, "sum")
        source = merge(source, "amax")
        size = merge(size, "sum")
        x = x / size
        x = x + _mlp(layer, x)
        outputs.append(source.transpose(1, 2) @ x)
    return outputs


def _attention(layer: Any, x: Tensor, size: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
    attention = getattr(layer, "attention", None) or layer.self_attn
    norm = next(getattr(layer, name) for name in ("layernorm_before", "layer_norm1", "norm1") if hasattr(layer, name))
    x = norm(x)
    heads = attention.q_proj.out_features // attention.head_dim
    q, k, v = (
        project(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    metric = k.mean(1)
    if rotary is not None:
        q, k = (_rotate(each, *rotary) for each in (q, k))
    logits = q @ k.transpose(2, 3) * attention.head_dim**-0.5 + size.log()[:, None, :, 0][:, :, None]
    y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = getattr(attention, "o_proj", getattr(attention, "out_proj", None))(y)
    return (layer.layer_scale1(y) if hasattr(layer, "layer_scale1") else y), metric


def _mlp(layer: Any, x: Tensor) -> Tensor:
    norm = next(getattr(layer, name) for name in ("layernorm_after", "layer_norm2", "norm2") if hasattr(layer, name))
    y = layer.mlp(norm(x))
    return layer.layer_scale2(y) if hasattr(layer, "layer_scale2") else y


def _rotary(tables: Any, place: Tensor, prefix: int) -> list[Tensor]:
    return [table[place[:, prefix:] - prefix][:, None] for table in tables]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    head, patches = x.split((x.shape[2] - cos.shape[2], cos.shape[2]), dim=2)
    first, second = patches.chunk(2, dim=-1)
    return torch.cat([head, patches * cos + torch.cat([-second, first], dim=-1) * sin], dim=2)


def _bipartite_soft_matching(metric: Tensor, r: int, prefix: int, place: Tensor) -> tuple[Any, Tensor]:
    """A and B are every second token; the r most similar pairs merge; prefix, rest of A, B is the order left."""
    metric = functional.normalize(metric, dim=-1)
    tokens = metric.shape[1]
    a, b = torch.arange(tokens)[::2], torch.arange(tokens)[1::2]
    scores = metric[:, a] @ metric[:, b].transpose(1, 2)
    scores[:, a < prefix] = -torch.inf
    scores[:, :, b < prefix] = -torch.inf
    r = min(r, (tokens - prefix) // 2)
    if not r:
        return (lambda x, how: x), place
    best, partner = scores.max(-1)
    ranked = best.argsort(dim=-1, descending=True)
    orders, groups = [], []
    for sample in range(len(metric)):
        gone = ranked[sample, :r]
        stays = torch.ones(len(a), dtype=torch.bool).index_fill(0, gone, False)
        order = [*range(min(prefix, tokens))]
        order += [int(i) for i in a[stays] if i >= prefix] + [int(i) for i in b if i >= prefix]
        group = {i: [i] for i in order}
        for one in gone.tolist():
            group[int(b[partner[sample, one]])].append(int(a[one]))
        orders.append(order)
        groups.append([group[i] for i in order])

    def merge(x: Tensor, how: str) -> Tensor:
        rows = [
            torch.stack([getattr(x[sample, members], how)(0) for members in groups[sample]])
            for sample in range(len(x))
        ]
        return torch.stack(rows)

    return merge, place.gather(1, torch.tensor(orders))
