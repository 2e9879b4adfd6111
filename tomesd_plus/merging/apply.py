"""Apply and remove token merging: the one place where a pipeline's models are changed."""

from collections.abc import Callable
from typing import Any, cast

from diffusers.models.attention_processor import Attention
from torch import nn

from tomesd_plus.host.models import attends_over_frames, models_of
from tomesd_plus.host.noise_level import NoiseLevels
from tomesd_plus.host.say import warn
from tomesd_plus.host.transformers import transformer_of
from tomesd_plus.merging.answers import Reason, Why
from tomesd_plus.merging.attachment import Attachment, attachments_on
from tomesd_plus.merging.config import Ratios, ToMeConfig
from tomesd_plus.merging.processor import ToMeProcessor, attach_to
from tomesd_plus.merging.report import ModelReport, TokenMergingReport
from tomesd_plus.merging.transformers import check_transformer, merge_transformer
from tomesd_plus.merging.wrapping import SET_BY_OTHERS, left_alone, listed, why_excluded


def apply_token_merging(
    pipe: Any,
    config: ToMeConfig | Ratios | None = None,
    *,
    ratio: Ratios | None = None,
    **options: Any,
) -> TokenMergingReport:
    """:func:`tomesd_plus.apply_token_merging` for diffusion; ``ratio`` is short for ``ToMeConfig(ratio=…)``."""
    if config is not None and not isinstance(config, ToMeConfig):
        config, ratio = None, config
    if ratio is not None:
        options["ratio"] = ratio
    if config is not None and options:
        raise TypeError(f"give either a config or options, not both: {', '.join(options)}")
    config = config or ToMeConfig(**options)
    transformer = transformer_of(pipe)
    if transformer is not None:
        return _merge_transformer(pipe, transformer, config)
    if config.blocks_per_run != 1:
        raise ValueError("blocks_per_run is of transformers: a UNet's blocks are merged one by one")
    noise_levels = NoiseLevels(pipe, config.follows_noise_level)
    return merge_with(pipe, lambda name, excluded: Attachment(config, noise_levels, name, excluded, stays=True))


def remove_token_merging(pipe: Any, warns: bool = True) -> None:
    """:func:`tomesd_plus.remove_token_merging` for diffusion, which need not warn if merging is off."""
    found = False
    for model in merged_models(pipe).values():
        for attachment in attachments_on(model):
            attachment.check_removable(model)
    for model in merged_models(pipe).values():
        for attachment in attachments_on(model):  # also those whose processors were replaced since
            found = True
            attachment.detach()
        for module in model.modules():
            processor = getattr(module, "processor", None)
            if isinstance(processor, ToMeProcessor):
                found = True
                cast(Any, module).set_processor(processor.inner)
    if warns and not found:
        warn("token merging is not applied, so there is nothing to remove", stacklevel=2)


def merging_report(pipe: Any) -> TokenMergingReport:
    """:func:`tomesd_plus.merging_report` for diffusion."""
    found = {name: attachments_on(model) for name, model in merged_models(pipe).items()}
    if not any(found.values()):
        raise ValueError(
            "token merging is not applied, its model has not been called yet, or a pipeline sets processors of its "
            "own over a ToMeProcessor: use apply_token_merging there"
        )
    return _report({name: attachments[0] for name, attachments in found.items() if attachments})


def merge_with(
    pipe: Any, make: Callable[[str, dict[str, Reason]], Attachment], unknown: bool = False
) -> TokenMergingReport:
    """Put processors and attachments on a pipeline's models.

    Args:
        pipe: As in :func:`apply_token_merging`.
        unknown: True to merge around processors that are not diffusers' too.
        make: ``(name, excluded layers) -> Attachment``, called for each model.
    """
    models = models_of(pipe)
    for name, model in models.items():
        if is_merging(model):
            raise ValueError(f"token merging is already applied to {name}: call remove_token_merging first")
        for attachment in attachments_on(model):  # its processors were replaced since
            attachment.detach()
    attachments = {}
    for name, model in models.items():
        prefix = f"{name}." if len(models) > 1 else ""
        merging: list[Attention] = []
        excluded: dict[str, Reason] = {}
        for layer_name, layer in model.named_modules():
            if isinstance(layer, Attention) and not layer.is_cross_attention:
                reason = (
                    Reason(Why.frames) if attends_over_frames(layer_name) else why_excluded(layer.processor, unknown)
                )
                if reason is None:
                    merging.append(layer)
                else:
                    excluded[f"{prefix}{layer_name}"] = reason
        attachment = make(prefix, excluded)
        if not merging:
            attachment.record.value = left_alone(excluded)
        _tell_of_excluded(name, excluded, nothing=not merging)
        for layer in merging:
            layer.set_processor(ToMeProcessor(inner=layer.processor, attachment=attachment))
        attach_to(model, attachment)
        attachments[name] = attachment
    return _report(attachments)


def merged_models(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline in which tokens may be merged, by name."""
    transformer = transformer_of(pipe)
    return models_of(pipe) if transformer is None else {"transformer": transformer}


def _merge_transformer(pipe: Any, model: nn.Module, config: ToMeConfig) -> TokenMergingReport:
    check_transformer(model, config)
    if is_merging(model):
        raise ValueError("token merging is already applied to transformer: call remove_token_merging first")
    for attachment in attachments_on(model):  # its processors were replaced since
        attachment.detach()
    controlled = getattr(pipe, "controlnet", None) is not None
    excluded = {"controlnet": Reason(Why.controlnet)} if controlled else {}
    return _report({"transformer": merge_transformer(pipe, model, config, excluded)})


def is_merging(model: nn.Module) -> bool:
    """True if a model carries a :class:`ToMeProcessor`."""
    return any(isinstance(getattr(module, "processor", None), ToMeProcessor) for module in model.modules())


def _report(attachments: dict[str, Attachment]) -> TokenMergingReport:
    return TokenMergingReport(
        {name: ModelReport(each.record, each.blocks.decisions, each.settle) for name, each in attachments.items()}
    )


def _tell_of_excluded(name: str, excluded: dict[str, Reason], nothing: bool) -> None:
    """Tell the user if no layer of a model can be merged, or if a processor that somebody has set keeps some from it.

    Args:
        name: The model's; a ControlNet may have no attention, and need not merge what it has not.
        excluded: The layers that cannot be merged, and why.
        nothing: True if there are no others.
    """
    set_by_somebody = {layer: why for layer, why in excluded.items() if why.why in SET_BY_OTHERS}
    told = excluded if nothing else set_by_somebody
    words = "; ".join(sorted({str(why) for why in told.values()}))
    if nothing and (excluded or not name.startswith("controlnet")):
        message = f"Token merging does nothing to {name}: no self-attention layer can be merged"
        warn(f"{message}: {words}." if words else f"{message}, for there is none.", stacklevel=4)
    elif set_by_somebody:
        warn(f"Token merging leaves {listed(list(told))} alone: {words}.", stacklevel=4)
