"""Joint attention of image and text tokens, of Stable Diffusion 3 and Flux, where image tokens stand for several."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import _helpers as host_registries
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor

from tomesd_plus.host.attention import attend

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, (tokens, channels of a head) or with a batch before that; those of a channel pair are equal."""

ANY_HEADS = (  # the attention backends that take heads with a few channels more
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_EFFICIENT,
    AttentionBackendName._NATIVE_FLASH,
    AttentionBackendName._NATIVE_MATH,
    AttentionBackendName.FLASH,
)


@dataclass(frozen=True, eq=False)
class Tokens:
    """A sequence of tokens that attends or is attended to.

    Args:
        image: (batch, image tokens, channels); where text and image share projections, the text before the image.
        rotary: Of all tokens, text first; ``None`` where positions are embedded otherwise.
    """

    image: Tensor
    rotary: Rotary | None = None


def is_known(processor: Any) -> bool:
    """True if :func:`joint_attention` does what a processor does."""
    return type(processor) in (JointAttnProcessor2_0, FluxAttnProcessor)


def register_joint_processor(kind: type) -> None:
    """Make a processor's class known to guiders that leave attention out, where the host has a registry for that."""
    registry = getattr(host_registries, "AttentionProcessorRegistry", None)
    if registry is not None:  # put there directly: the registry's own method first imports a dozen of transformers
        registry._registry[kind] = host_registries.AttentionProcessorMetadata(skip_processor_output_fn=_left_out)


def _left_out(
    attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """An attention layer's output where it is left out."""
    return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


def joint_attention(
    attn: Any,
    queries: Tokens,
    keys: Tokens,
    text: Tensor | None,
    sizes: Tensor | None = None,
    backend: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend as diffusers' processors for these models do, with keys that weigh as many tokens as they stand for.

    Stable Diffusion 3's ignores a mask, and Flux's cannot rotate each sample's tokens by angles of their own. How a
    key is made to weigh, after the norms, :func:`~tomesd_plus.host.attention.attend` tells; text keys weigh 1.

    Args:
        attn: The layer: projections, norms and heads.
        queries, keys: Where queries, and keys and values, come from.
        text: The text's tokens, (batch, text tokens, channels); ``None`` if there are none, or they are among
            ``queries`` and ``keys`` already.
        sizes: How many tokens each of ``keys`` stands for, (batch, keys); ``None``: one each.
        backend: As ``set_attention_backend`` leaves it.

    Returns:
        The queries' output, (batch, queries, channels); with text also the text's.
    """
    first = isinstance(attn, FluxAttention)  # Flux has the text before the image, Stable Diffusion 3 after it
    query, key, value = (
        layer(tokens.image).unflatten(-1, (-1, _channels(attn)))  # (batch, tokens, heads, channels)
        for layer, tokens in ((attn.to_q, queries), (attn.to_k, keys), (attn.to_v, keys))
    )
    query, key = _normalized(attn.norm_q, query), _normalized(attn.norm_k, key)
    if text is not None:
        added = [layer(text).unflatten(-1, (-1, _channels(attn))) for layer in _text_projections(attn)]
        added[:2] = _normalized(attn.norm_added_q, added[0]), _normalized(attn.norm_added_k, added[1])
        query, key, value = (
            torch.cat([of_text, of_image] if first else [of_image, of_text], dim=1)
            for of_text, of_image in zip(added, (query, key, value), strict=True)
        )
        if sizes is not None:
            ones = sizes.new_ones(len(sizes), text.shape[1])
            sizes = torch.cat([ones, sizes] if first else [sizes, ones], dim=1)
    query, key = rotated(query, queries.rotary), rotated(key, keys.rotary)
    masked = query.device.type == "cpu" and backend is None
    output = attend(query, key, value, sizes, backend, masked).flatten(2).to(query.dtype)
    if text is None:
        return _out(attn, output)
    length = text.shape[1]
    of_text, of_image = (
        (output[:, :length], output[:, length:]) if first else (output[:, -length:], output[:, :-length])
    )
    return _out(attn, of_image), of_text if attn.context_pre_only else attn.to_add_out(of_text)


def rotated(heads: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotate pairs of neighbouring channels, as "RoFormer" does (https://arxiv.org/abs/2104.09864).

    Args:
        heads: (batch, tokens, heads, channels).
        rotary: By which angles; ``None``: by none.
    """
    if rotary is None:
        return heads
    cosine, sine = (each[..., ::2].unsqueeze(-2).to(heads.device) for each in rotary)  # the same for all heads
    even, odd = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
    return turned.flatten(-2).to(heads.dtype)


def _channels(attn: Any) -> int:
    """Channels of a head."""
    return int(attn.head_dim if isinstance(attn, FluxAttention) else attn.inner_dim // attn.heads)


def _normalized(norm: Any, heads: Tensor) -> Tensor:
    return heads if norm is None else norm(heads)


def _text_projections(attn: Any) -> tuple[Any, Any, Any]:
    return attn.add_q_proj, attn.add_k_proj, attn.add_v_proj


def _out(attn: Any, output: Tensor) -> Tensor:
    if getattr(attn, "pre_only", False):  # Flux's single blocks project it together with the MLP's
        return output
    return attn.to_out[1](attn.to_out[0](output))
