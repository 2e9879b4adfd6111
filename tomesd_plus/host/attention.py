"""Attention among tokens that stand for several, without a mask."""

import math
from typing import Any

import torch
from diffusers.hooks import _helpers as host_registries
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import (
    Attention,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGCFGJointAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
)
from torch import Tensor
from torch.nn.functional import pad

_NATIVE = AttentionBackendName.NATIVE  # the host's own default is what any model has set last, for all models
EXTRA_CHANNELS = 8  # one is used; kernels want a multiple of eight


def register_processor(kind: type) -> None:
    """Make a processor's class known to guiders that leave attention out, where the host has a registry for that.

    Put there directly: the registry's own method first imports a dozen of transformers.
    """
    registry = getattr(host_registries, "AttentionProcessorRegistry", None)
    if registry is not None:
        registry._registry[kind] = host_registries.AttentionProcessorMetadata(skip_processor_output_fn=_skipped)


def _skipped(attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An attention layer's output where it is left out."""
    return hidden_states


STORES = {"attnstore", "attention_store", "attention_probs", "controller"}
"""Attributes of processors that hand maps to their pipelines: LEDITS++, Attend-and-Excite, SAG, prompt-to-prompt."""


def keeps_attention_maps(processor: Any) -> bool:
    """True for a processor that stores attention maps for its pipeline."""
    inner = getattr(processor, "inner", processor)
    return bool(STORES & getattr(inner, "__dict__", {}).keys())


_OF_PIPELINES = (
    PAGIdentitySelfAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
    PAGCFGJointAttnProcessor2_0,
)


def is_of_pipeline(processor: Any) -> bool:
    """True for a processor that the host's pipelines put in place for their own calls, such as PAG or LEDITS++."""
    return isinstance(processor, _OF_PIPELINES) or type(processor).__module__.startswith("diffusers.pipelines.")


def attention(
    attn: Attention,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    sizes: Tensor | None = None,
    backend: Any = None,
) -> Tensor:
    """Attend as diffusers' scaled-dot-product processor does, by any of its attention backends.

    A key that stands for s tokens must weigh s times, so log s is added to its logits ("proportional attention" of
    Bolya et al., https://arxiv.org/abs/2210.09461). A mask would rule out flash attention; here the heads get a
    channel more instead, 1 in every query and √channels · log s in the keys, which the kernel's own scaling by
    1/√channels turns into log s.

    Args:
        attn: The layer: its projections and heads.
        hidden_states: Where queries come from, (batch, queries, channels).
        key_value_states: Where keys and values come from, (batch, keys, channels); the same by default.
        sizes: How many tokens each key stands for, (batch, keys); ``None``: one each.
        backend: As ``set_attention_backend`` leaves it; PyTorch's own choice by default.

    Returns:
        (batch, queries, channels), like ``hidden_states``.
    """
    key_value_states = hidden_states if key_value_states is None else key_value_states
    query, key, value = (
        layer(states).unflatten(-1, (attn.heads, -1))  # (batch, tokens, heads, channels)
        for layer, states in ((attn.to_q, hidden_states), (attn.to_k, key_value_states), (attn.to_v, key_value_states))
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    output = attend(query, key, value, sizes, backend).flatten(2).to(query.dtype)
    return attn.to_out[1](attn.to_out[0](output)) / attn.rescale_output_factor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Tensor | None = None,
    backend: Any = None,
    masked: bool = False,
) -> Tensor:
    """Attention of heads, in which a key that stands for several tokens weighs as many times.

    Args:
        query, key, value: (batch, tokens, heads, channels), normalized and rotated if that is wanted.
        sizes: How many tokens each key stands for, (batch, keys); ``None``: one each.
        backend: As in :func:`attention`.
        masked: Hand the sizes over as a mask, which is as exact, and cheaper on a CPU (``results/README.md``).

    Returns:
        (batch, queries, heads, channels).
    """
    channels = query.shape[-1]
    mask = None
    if sizes is not None and masked:
        mask = sizes.log()[:, None, None].to(query.dtype)  # (batch, 1, 1, keys)
    elif sizes is not None:
        exact = torch.promote_types(key.dtype, torch.float32)
        weight = (
            (math.sqrt(channels) * sizes.to(exact).log())
            .to(key.dtype)[:, :, None, None]
            .expand(-1, -1, key.shape[2], 1)
        )
        one = torch.ones_like(query[..., :1])
        query, key, value = (
            pad(torch.cat(parts, dim=-1), (0, channels + EXTRA_CHANNELS - sum(p.shape[-1] for p in parts)))
            for parts in ((query, one), (key, weight), (value,))
        )
    output = dispatch_attention_fn(
        query, key, value, attn_mask=mask, scale=1 / math.sqrt(channels), backend=backend or _NATIVE
    )
    return output[..., :channels]
