"""The attention processor: plan, merge, the processor that was there before, unmerge."""

import weakref
from typing import Any, cast

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tomesd_plus.host.attention import attention
from tomesd_plus.merging.attachment import TokenMerger, mergers_on
from tomesd_plus.merging.config import ToMeConfig


class ToMeProcessor:
    """Merges tokens around self-attention; passes everything else through untouched.

    One instance serves a whole model::

        pipe.unet.set_attn_processor(ToMeProcessor())

    At the model's first call it finds the model by itself and from then on knows noise level, step and latent size.
    Set this way it replaces what processors the model had, an IP-Adapter's too, and takes 1,000 timesteps of training
    for granted; to keep the processors use :func:`tomesd_plus.apply_token_merging`. An instance serves one model.

    It honours ``unet.set_attention_backend(…)``, which diffusers' own processors for these models do not.

    Args:
        config: What to merge; ``ToMeConfig()`` by default.
        inner: The processor to merge around; diffusers' scaled-dot-product one by default.
        merger: The state shared with a model's other processors; made if not given.
        options: Fields of :class:`ToMeConfig`, in place of ``config``.

    Raises:
        TypeError: Both ``config`` and options are given.
        ValueError: An option is out of range.
    """

    _attention_backend: Any = None  # diffusers' ``set_attention_backend`` sets it on processors that have it
    _parallel_config: Any = None

    def __init__(
        self,
        config: ToMeConfig | None = None,
        *,
        inner: Any = None,
        merger: TokenMerger | None = None,
        **options: Any,
    ) -> None:
        if options and (config is not None or merger is not None):
            raise TypeError(f"give either a config or options, not both: {', '.join(options)}")
        self.inner = inner if inner is not None else AttnProcessor2_0()
        self.merger = merger if merger is not None else TokenMerger(config or ToMeConfig(**options))
        self.default = config is None and not options
        if merger is None:
            _FirstCall(self)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend, with fewer tokens where that is understood; takes and returns what the inner processor does."""
        plan, understood = None, False
        if not attn.is_cross_attention:
            reason = _why_not(attn, hidden_states, encoder_hidden_states, attention_mask, self.merger.config)
            if reason is None and self.merger.config.reuse_attention:
                reused = self.merger.reused(attn, hidden_states)
                if reused is not None:
                    return reused
                understood = True
            elif reason is None:
                plan = self.merger.plan_for(attn, hidden_states)
                understood = True
            else:
                tokens = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2:].numel()
                self.merger.record(attn, tokens, 0, reason)
        if plan is None:
            output = self._attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
            if understood and self.merger.config.merge_self_attention:
                self.merger.keep_detail(attn, output)
            return output

        config = self.merger.config
        sizes = plan.sizes if config.proportional_attention and not config.queries_only else None
        if self.merger.blocks.inside:
            return self._attend(attn, hidden_states, None, None, temb, *args, sizes=sizes, **kwargs)
        merged = plan.merge(hidden_states, config.mode)
        if config.keys_values_only:
            return self._attend(attn, hidden_states, merged, None, temb, *args, sizes=sizes, **kwargs)
        key_value_states = hidden_states if config.queries_only else None
        output = self._attend(attn, merged, key_value_states, None, temb, *args, sizes=sizes, **kwargs)
        return self.merger.details.unmerge(attn, plan, output)

    def _attend(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
        *args: Any,
        sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend by the inner processor, or in its place where a kernel that it cannot use is to be had."""
        own = self._attention_backend is not None or (sizes is not None and hidden_states.device.type == "cuda")
        if own and type(self.inner) is AttnProcessor2_0 and _is_plain(attn, hidden_states, attention_mask):
            return attention(attn, hidden_states, encoder_hidden_states, sizes, self._attention_backend)
        if sizes is not None:  # (batch, 1, keys), added to the logits of every head and query
            attention_mask = sizes.log()[:, None].to(hidden_states.dtype)
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _FirstCall(self)  # goes by itself if the copy's merger has its model, which a half-made copy cannot tell


class _FirstCall:
    """A hook on every module's call, until the call of the model that carries the processor.

    ``set_attn_processor`` tells a processor nothing of its model, so the processor waits for the model's first call,
    puts the merger's hooks on the model, and gives the merger this first call, which those hooks came too late for.
    """

    def __init__(self, processor: ToMeProcessor) -> None:
        self._processor = weakref.ref(processor)
        self._model: weakref.ref[nn.Module] | None = None
        self._timestep: Tensor | None = None
        self._handle = register_module_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        processor = self._processor()
        if processor is None:
            self._handle.remove()
        elif self._model is not None:
            self._read_from_inside(module, args, processor.merger)
        elif processor.merger.attached:
            self._handle.remove()
        elif isinstance(module, ModelMixin) and _carries(module, processor):
            if not adopt(module, processor.merger):
                self._handle.remove()  # another merger took the processor over, and its hook sees this call
            elif len(args) >= 2:
                self._handle.remove()
                processor.merger.begin_step(module, args, {})
            else:
                self._model = weakref.ref(module)

    def _read_from_inside(self, module: nn.Module, args: tuple[Any, ...], merger: TokenMerger) -> None:
        # Such hooks are not shown keyword arguments. A model called with some hands them on, by position, to the two
        # layers that every SD UNet and ControlNet calls first: time_proj(timestep), then conv_in(sample).
        model = self._model() if self._model is not None else None
        if model is None or module is model:  # gone, or called again after its first call failed
            self._handle.remove()
        elif module is getattr(model, "time_proj", None):
            self._timestep = args[0]
        elif module is getattr(model, "conv_in", None):
            self._handle.remove()
            merger.begin_step(model, (args[0], self._timestep), {})


def adopt(model: nn.Module, merger: TokenMerger) -> bool:
    """Hook a merger into a model and make it that of every processor there that has found no model yet.

    Loading or unloading an IP-Adapter makes the host replace every self-attention processor by ``cls()``. Where such
    processors are found on a model that a merger is hooked into already, that one takes them over.

    Returns:
        True if the merger was hooked in; False if one that was there before has taken its processors over.
    """
    layers = [m for m in model.modules() if isinstance(getattr(m, "processor", None), ToMeProcessor)]
    processors = {id(layer.processor): cast(ToMeProcessor, layer.processor) for layer in layers}
    remade = len(processors) == len(layers) > 1 and all(
        p.default and not p.merger.attached for p in processors.values()
    )
    before = mergers_on(model)
    owner = before[0] if before and remade else merger
    for processor in processors.values():
        if not processor.merger.attached:
            processor.merger = owner
    attentions = [layer for layer in layers if cast(ToMeProcessor, layer.processor).merger is owner]
    if owner is merger:
        merger.attach(model, attentions)
    else:
        owner.attentions = attentions
    return owner is merger


def _carries(model: nn.Module, processor: ToMeProcessor) -> bool:
    return any(getattr(module, "processor", None) is processor for module in model.modules())


def _is_plain(attn: Attention, hidden_states: Tensor, attention_mask: Tensor | None) -> bool:
    """True if a call is attention and nothing else."""
    return (
        hidden_states.ndim == 3
        and attention_mask is None
        and attn.group_norm is None
        and attn.spatial_norm is None
        and not attn.residual_connection
        and not attn.norm_cross
    )


def _why_not(
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    config: ToMeConfig,
) -> str | None:
    """Why a self-attention call is not understood, and so left alone; ``None`` if it is."""
    if hidden_states.ndim != 3:
        return "its input is not (batch, tokens, channels)"
    if encoder_hidden_states is not None:
        return "it attends to other states than its own"
    if attention_mask is not None:
        return "it has an attention mask"
    if attn.group_norm is not None or attn.spatial_norm is not None:
        return "it normalizes over the picture"
    if attn.residual_connection:
        return "it adds its input by itself"
    if attn.added_kv_proj_dim is not None:
        return "it attends to text too"
    if attn.fused_projections and (config.keys_values_only or config.queries_only):
        return "its projections are fused, so queries and keys cannot have tokens of their own"
    return None
