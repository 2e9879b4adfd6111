"""The attention processor: plan, merge, the processor that was there before, unmerge."""

from typing import Any, cast

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from tomesd_plus.host.attention import attention, is_of_pipeline, register_processor
from tomesd_plus.host.first_call import FirstCalls, taken_off
from tomesd_plus.merging.answers import AlreadyMerged, Leave
from tomesd_plus.merging.attachment import Attachment, attachments_on
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.telling import tell_of_passing_by
from tomesd_plus.merging.wrapping import why_not_understood


class ToMeProcessor:
    """Merges tokens around self-attention; passes everything else through untouched.

    One instance serves a whole model::

        pipe.unet.set_attn_processor(ToMeProcessor())

    At the model's first call it finds the model by itself and from then on knows noise level, step and latent size.
    Set this way it replaces what processors the model had, an IP-Adapter's too, and takes 1,000 timesteps of training
    for granted; to keep the processors use :func:`tomesd_plus.apply_token_merging`. An instance serves one model.
    Processors that the host makes anew from an instance's class, as for an IP-Adapter, have its settings.

    It honours ``unet.set_attention_backend(…)``, which diffusers' own processors for these models do not.

    Args:
        config: What to merge; ``ToMeConfig()`` by default.
        inner: The processor to merge around; diffusers' scaled-dot-product one by default.
        attachment: Shared with a model's other processors; made if not given.
        options: Fields of :class:`ToMeConfig`, in place of ``config``.

    Raises:
        TypeError: Both ``config`` and options are given.
        ValueError: An option is out of range.
    """

    _attention_backend: Any = None  # diffusers' ``set_attention_backend`` sets it on processors that have it
    _parallel_config: Any = None
    _settings: ToMeConfig | None = None  # of this class, where it is one with settings

    def __init__(
        self,
        config: ToMeConfig | None = None,
        *,
        inner: Any = None,
        attachment: Attachment | None = None,
        **options: Any,
    ) -> None:
        if options and (config is not None or attachment is not None):
            raise TypeError(f"give either a config or options, not both: {', '.join(options)}")
        self.inner = inner if inner is not None else AttnProcessor2_0()
        self.default = config is None and not options and attachment is None
        if options:
            config = ToMeConfig(**options)
        if config is not None and attachment is None:
            self.__class__ = _class_with(type(self), config)
        if attachment is None:
            attachment = Attachment(config or self._settings or ToMeConfig())
            _waiting.add(self)
        self.attachment = attachment

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend, with fewer tokens where that is understood; takes and returns what the inner processor does."""
        if temb is not None:  # not every processor takes it
            kwargs["temb"] = temb
        if attn.is_cross_attention:
            return self._attend(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        attachment, config = self.attachment, self.attachment.config
        if attachment.decider.call() is None or not attachment.decider.serves(attn):
            attachment.came_back(attn)
        obstacle = why_not_understood(attn, hidden_states, encoder_hidden_states, attention_mask, config)
        answer = attachment.decider.ask(attn, "self_attention", hidden_states, obstacle)
        if isinstance(answer, Leave):
            output = self._attend(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
            answer.done(output)
            return output
        weighed = config.proportional_attention and config.sides != "queries"
        sizes = answer.plan.sizes if weighed else None
        if isinstance(answer, AlreadyMerged):
            return self._attend(attn, hidden_states, sizes=sizes, **kwargs)
        merged = answer.merge(hidden_states)
        if config.sides == "keys_values":
            return self._attend(attn, hidden_states, merged, sizes=sizes, **kwargs)
        key_value_states = hidden_states if config.sides == "queries" else None
        return answer.unmerge(self._attend(attn, merged, key_value_states, sizes=sizes, **kwargs))

    def _attend(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend by the inner processor, or in its place where a kernel that it cannot use is available."""
        if isinstance(encoder_hidden_states, tuple) and type(self.inner) is AttnProcessor2_0:
            raise TypeError(
                "this model has an IP-Adapter, whose processors set_attn_processor(ToMeProcessor()) has replaced: "
                "use apply_token_merging(pipe), which keeps them"
            )
        own = self._attention_backend is not None or (sizes is not None and hidden_states.device.type == "cuda")
        if own and type(self.inner) is AttnProcessor2_0 and _is_plain(attn, hidden_states, attention_mask):
            return attention(attn, hidden_states, encoder_hidden_states, sizes, self._attention_backend)
        if sizes is not None:  # (batch, 1, keys), added to the logits of every head and query
            attention_mask = sizes.log()[:, None].to(hidden_states.dtype)
        # As diffusers calls it: by keyword, and no more than was given.
        return self.inner(
            attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **kwargs
        )

    def __del__(self) -> None:
        attachment = getattr(self, "attachment", None)  # none if the arguments were refused
        taken = None if attachment is None or attachment.stays else taken_off()
        if attachment is not None and taken is not None:
            if attachment.attached:
                attachment.taken_by_pipeline = taken[1]
            else:
                _waiting.dropped(*taken)

    def __reduce__(self) -> Any:
        base = type(self) if self._settings is None else type(self).__base__
        return _new, (base, self._settings), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _waiting.add(self)  # goes by itself if the copy's attachment has its model, which a half-made copy cannot tell


def _class_with(kind: type[ToMeProcessor], settings: ToMeConfig) -> type[ToMeProcessor]:
    """A processor's class whose instances have these settings by default.

    Where a host makes processors anew it calls a processor's class without arguments.
    """
    made = _classes.get((kind, repr(settings)))
    if made is None:
        own = {"_settings": settings, "__module__": kind.__module__, "__doc__": kind.__doc__}
        made = _classes[kind, repr(settings)] = type(kind.__name__, (kind,), own)
        register_processor(made)
    return made


def _new(kind: type[ToMeProcessor], settings: ToMeConfig | None) -> ToMeProcessor:
    """An instance to be filled in, for copies and pickles."""
    kind = kind if settings is None else _class_with(kind, settings)
    return kind.__new__(kind)


_classes: dict[tuple[type[ToMeProcessor], str], type[ToMeProcessor]] = {}
register_processor(ToMeProcessor)


def attach_to(model: nn.Module, own: Attachment | None = None) -> bool:
    """Attach the processors of a model that wait for it.

    Args:
        model: A UNet or ControlNet.
        own: An attachment whose processors have just been put on it.

    Returns:
        False if it carries no :class:`ToMeProcessor`, attached or not.
    """
    with _waiting.lock:
        processors = _processors_on(model)
        for processor in processors:
            waits = processor in _waiting.waiting or processor.attachment is own
            _waiting.waiting.discard(processor)
            if waits and not processor.attachment.attached:
                _adopt(model, processor.attachment)
    return bool(processors)


def _begin_call(model: nn.Module, sample: Tensor, timestep: Tensor | None) -> None:
    """Give a model's first call to the attachments whose hooks came too late for it."""
    for attachment in attachments_on(model):
        call = attachment.decider.current.call
        if call is None or not call.running:
            attachment.begin_call(model, (sample, timestep), {})


def _carries_unattached(model: nn.Module) -> bool:
    return not all(processor.attachment.attached for processor in _processors_on(model))


def _has_model(processor: ToMeProcessor) -> bool:
    attachment = getattr(processor, "attachment", None)  # none while it is being copied
    return attachment is not None and attachment.attached


_waiting = FirstCalls(_carries_unattached, attach_to, _begin_call, tell_of_passing_by, _has_model)


def _adopt(model: nn.Module, attachment: Attachment) -> None:
    """Attach merging to a model, for every processor there that has found no model yet.

    Loading or unloading an IP-Adapter makes the host replace every self-attention processor by ``cls()``. Where such
    processors are found on a model that has an attachment already, that one takes them over.
    """
    layers = [m for m in model.modules() if isinstance(getattr(m, "processor", None), ToMeProcessor)]
    processors = _processors_on(model)
    remade = len(processors) == len(layers) > 1 and all(p.default and not p.attachment.attached for p in processors)
    before = attachments_on(model)
    owner = before[0] if before and remade else attachment
    for processor in processors:
        if not processor.attachment.attached:
            processor.attachment = owner
    attentions = [layer for layer in layers if cast(ToMeProcessor, layer.processor).attachment is owner]
    if owner is attachment:  # where a pipeline's own are in place for its call, ours will be put back
        lent = [m for m in model.modules() if is_of_pipeline(getattr(m, "processor", None))]
        attachment.attach(model, attentions if attachment.stays else [*attentions, *lent])
        for each in before:
            if not each.serves_any():
                each.lose(model)  # its processors were replaced by these
    else:
        owner.attentions = attentions


def _processors_on(model: nn.Module) -> list[ToMeProcessor]:
    """The different ones, in the layers' order."""
    found = (getattr(module, "processor", None) for module in model.modules())
    return list({id(each): each for each in found if isinstance(each, ToMeProcessor)}.values())


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
