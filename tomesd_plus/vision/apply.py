"""Apply and remove token merging in vision towers: the one place where a model is changed."""

from typing import Any, cast

from torch import nn

from tomesd_plus.host.say import warn
from tomesd_plus.vision.attachment import Attachment
from tomesd_plus.vision.attention import NAME, merging_config
from tomesd_plus.vision.config import TowerConfig
from tomesd_plus.vision.hooks import (
    AfterKeys,
    AfterLayer,
    AfterMlp,
    AfterPatches,
    BeforeAttention,
    BeforeLayer,
    BeforeNorm,
    BeforeStack,
    hooks_on,
)
from tomesd_plus.vision.methods import METHODS
from tomesd_plus.vision.report import TowerReport
from tomesd_plus.vision.towers import Tower, model_of, towers_of
from tomesd_plus.vision.versions import refuse_too_old


def merge_towers(model_or_pipeline: Any, config: TowerConfig) -> TowerReport:
    """Put hooks on all vision towers of a model; see :func:`tomesd_plus.apply_token_merging`."""
    refuse_too_old()
    towers = towers_of(model_or_pipeline)
    for tower in towers:
        _check(tower, config)
    return TowerReport([_attach(tower, config) for tower in towers])


def unmerge_towers(model_or_pipeline: Any) -> None:
    """Take all hooks off; see :func:`tomesd_plus.remove_token_merging`."""
    model = model_of(model_or_pipeline)
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    found = hooks_on(modules)
    for hooks, key, _ in found:
        del hooks[key]
    for module in modules:
        for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
            for key in [key for key in flags if key not in {*module._forward_pre_hooks, *module._forward_hooks}]:
                del flags[key]
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation_internal", None) == NAME:
            cast(Any, module).config = config.token_merging.config
    if not found:
        towers_of(model_or_pipeline)  # raises where there is nothing that could be merged
        warn("token merging is not applied, so there is nothing to remove", stacklevel=3)


def towers_report(model_or_pipeline: Any) -> TowerReport:
    """The report of the merging that is on; raises ValueError if it is off."""
    attachments = attachments_on(model_or_pipeline)
    if not attachments:
        raise ValueError("token merging is not applied")
    return TowerReport(attachments)


def attachments_on(model_or_pipeline: Any) -> list[Attachment]:
    """Of the towers on which merging is on; raises TypeError where there are no towers."""
    stacks = [tower.stack for tower in towers_of(model_or_pipeline)]
    return list(dict.fromkeys(hook.attachment for _, _, hook in hooks_on(stacks)))


def _check(tower: Tower, config: TowerConfig) -> None:
    name = tower.name or "the model"
    if hooks_on([tower.stack]):
        raise ValueError(f"token merging is already applied to {name}: call remove_token_merging first")
    if METHODS[config.method].needs_class_token and tower.prefix == 0:
        raise ValueError(
            f"method={config.method!r} looks at the class token, and {name} ({type(tower.stack).__name__}) has none: "
            "use method='merging'"
        )
    config.check_layers(len(tower.layers))


def _attach(tower: Tower, config: TowerConfig) -> Attachment:
    attachment = Attachment(config, tower.name, list(tower.layers), tower.prefix)
    tower.patches.register_forward_hook(AfterPatches(attachment))
    tower.stack.register_forward_pre_hook(BeforeStack(attachment), with_kwargs=True)
    shared: Any = None
    layer: Any
    for index, layer in enumerate(tower.layers.values()):
        attention: Any = tower.attention(layer)
        shared = shared or merging_config(attention, attachment.current)
        attention.config = shared
        heads = attention.k_proj.out_features // attention.head_dim
        layer.register_forward_pre_hook(BeforeLayer(attachment, index, heads), with_kwargs=True)
        layer.register_forward_hook(AfterLayer(attachment), with_kwargs=True, prepend=True)
        attention.register_forward_pre_hook(BeforeAttention(attachment), with_kwargs=True)
        attention.k_proj.register_forward_hook(AfterKeys(attachment))
        getattr(layer, tower.family.norm).register_forward_pre_hook(BeforeNorm(attachment))
        layer.mlp.register_forward_hook(AfterMlp(attachment))
    return attachment
