"""Around which processors of others, and in which of their calls, tokens can be merged; and how they are named."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tomesd_plus.host.attention import is_of_pipeline, keeps_attention_maps
from tomesd_plus.merging.answers import Reason, Why
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.generation import LayerRecord, Record

SET_BY_OTHERS = (
    Why.module_processor,
    Why.own_arguments,
    Why.pipelines_processor,
    Why.attention_maps,
    Why.foreign_processor,
)
"""Why no processor is put around one that somebody has set: a layer is not merged where that was asked for."""


def why_excluded(processor: Any, unknown: bool = False) -> Reason | None:
    """Why no processor of ours can be put around a UNet's one, or ``None``.

    Args:
        processor: Of a self-attention layer.
        unknown: True to merge around processors that may need every token too.
    """
    if isinstance(processor, nn.Module):
        return Reason(Why.module_processor)
    named = {"attn", "hidden_states", "encoder_hidden_states", "attention_mask", "temb"}
    parameters = inspect.signature(processor.__call__).parameters.values()
    whatever = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    extra = {each.name for each in parameters if each.kind not in whatever} - named
    if extra:  # Attention hands on such arguments only to a processor whose own signature names them
        return Reason(Why.own_arguments, (", ".join(sorted(extra)),))
    if unknown or getattr(processor, "permutation_equivariant", False):
        return None
    kind = type(processor)
    if is_of_pipeline(processor):
        return Reason(Why.pipelines_processor, (kind.__name__,))
    if keeps_attention_maps(processor):
        return Reason(Why.attention_maps, (kind.__name__,))
    known = kind.__module__.partition(".")[0] == "diffusers"
    return None if known else Reason(Why.foreign_processor, (kind.__name__,))


def why_not_understood(
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    config: ToMeConfig,
) -> Reason | None:
    """Why a call of a UNet's self-attention is left alone; ``None`` if it is understood."""
    found = {
        Why.not_tokens: hidden_states.ndim != 3,
        Why.other_states: encoder_hidden_states is not None,
        Why.mask: attention_mask is not None,
        Why.normalizes: attn.group_norm is not None or attn.spatial_norm is not None,
        Why.residual: attn.residual_connection,
        Why.text_too: attn.added_kv_proj_dim is not None,
        Why.fused: attn.fused_projections and config.sides != "both",
    }
    return next((Reason(why) for why, true in found.items() if true), None)


def why_replaced(processor: Any) -> Reason:
    """Why a layer is left alone whose processor of ours was replaced by another one."""
    why = Why.pipelines_processor if is_of_pipeline(processor) else Why.replaced
    return Reason(why, (type(processor).__name__,))


def processors_on(model: nn.Module) -> list[Any]:
    """The processors of a model's attention layers."""
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def left_alone(layers: Mapping[str, Reason]) -> Record:
    """A record that begins with layers that are left alone, by name."""
    return Record({name: LayerRecord(name, left_alone=reason) for name, reason in layers.items()})


def kinds(processors: Iterable[Any]) -> str:
    """The processors' classes."""
    return ", ".join(sorted({type(processor).__name__ for processor in processors}))


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
