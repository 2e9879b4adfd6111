"""Attention among tokens that stand for several, as a function that transformers knows by name."""

import copy
import math
import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tomesd_plus.vision.call import KEY, Current

NAME = "token_merging"
EXTRA_CHANNELS = 8  # two are used; kernels want a multiple of eight


@dataclass
class Inner:
    """What the attention function calls: whatever the tower's own config says at the time.

    Args:
        config: The tower's.
        eager: The eager attention of the tower's own file.
        current: What each thread has under way in the tower.
    """

    config: Any
    eager: Any
    current: Current


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend by the tower's own implementation, each key weighing as much as the tokens that it stands for.

    A key that stands for s tokens must weigh s times, so log s is added to its logits ("proportional attention" of
    Bolya et al., https://arxiv.org/abs/2210.09461). A mask would rule out flash attention, so the heads get channels
    more: 1 in every query, log s over the scaling in the keys. There are two, for the value and for what its rounding
    in half precision leaves. CPUs take a mask at less cost.

    Args:
        module: The attention layer, whose config is one of :func:`merging_config`.
        query, key, value: (batch, heads, tokens, channels).
        attention_mask: Of a call that is left alone.
        scaling: Of the logits; 1/√channels by default.
        kwargs: For the implementation; and what layers are given under ``token_merging``.

    Returns:
        (batch, tokens, heads, channels), and the attention's weights if the implementation tells them.
    """
    inner: Inner = module.config.token_merging  # type: ignore[union-attr, assignment]
    name = inner.config._attn_implementation
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(name, inner.eager)
    kwargs.pop(KEY, None)
    if name not in MASKED:  # flash attention reads the implementation's name off the layer's config
        module = cast(nn.Module, _WithConfig(module, inner.config))
    step = inner.current.layer
    if step is None:
        return implementation(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    channels = query.shape[-1]
    scaling = 1 / math.sqrt(channels) if scaling is None else scaling
    log_sizes = step.log_sizes
    if step.looks_at_class_token:
        step.attention = class_attention(query, key, log_sizes, scaling)
        step.value_norms = value.detach().norm(dim=-1, dtype=torch.float32)
    if log_sizes is None or (query.device.type == "cpu" and name in MASKED):
        mask = None if log_sizes is None else log_sizes.to(query.dtype)
        return implementation(module, query, key, value, mask, scaling=scaling, **kwargs)
    query, key, value = with_extra_channels(query, key, value, log_sizes, scaling)
    output, weights = implementation(module, query, key, value, None, scaling=scaling, **kwargs)
    return output[..., :channels], weights


MASKED = ("sdpa", "eager")
"""Implementations that take a mask on a CPU."""


class _WithConfig:
    """An attention layer as it is, but for its config, which is the tower's own."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def with_extra_channels(
    query: Tensor, key: Tensor, value: Tensor, log_sizes: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose attention without a mask is that with ``log_sizes`` as the mask.

    Args:
        query, key, value: (batch, heads, tokens, channels).
        log_sizes: (batch, 1, 1, tokens), float32.
        scaling: Of the logits.

    Returns:
        The same with 8 channels more; in the attention's output those are to be cut off.
    """
    exact = (log_sizes / scaling).transpose(2, 3).expand(*key.shape[:3], 1)
    high = exact.to(key.dtype)
    low = (exact - high.to(exact.dtype)).to(key.dtype)
    ones = torch.ones_like(query[..., :2])
    query, key = torch.cat([query, ones], dim=-1), torch.cat([key, high, low], dim=-1)
    return pad(query, (0, EXTRA_CHANNELS - 2)), pad(key, (0, EXTRA_CHANNELS - 2)), pad(value, (0, EXTRA_CHANNELS))


@torch.no_grad()
def class_attention(query: Tensor, key: Tensor, log_sizes: Tensor | None, scaling: float) -> Tensor:
    """What the first token attends to, (batch, heads, tokens), float32."""
    logits = (query[:, :, :1] @ key.transpose(2, 3)).float() * scaling
    logits = logits if log_sizes is None else logits + log_sizes
    return logits.softmax(dim=-1)[:, :, 0]


def merging_config(module: Any, current: Current) -> Any:
    """A copy of an attention layer's config that names :func:`attend`, for a tower's attention layers alone.

    The tower's own config stays as it is: it makes the masks, is saved, and may be set to another implementation.
    """
    copied = copy.copy(module.config)
    copied._attn_implementation_internal = NAME
    copied.token_merging = Inner(module.config, sys.modules[type(module).__module__].eager_attention_forward, current)
    return copied


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
