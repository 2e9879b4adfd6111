"""What is read off diffusers' models and pipelines, in one place."""

from typing import Any, TypeVar

from torch import nn

from tomesd_plus.host.arguments import positions

Owner = TypeVar("Owner")


def unwrapped(model: Any) -> Any:
    """A model as it is without ``torch.compile`` around it."""
    return getattr(model, "_orig_mod", model)


def unet_of(pipe: Any) -> nn.Module:
    """The UNet of a pipeline, or the UNet or ControlNet itself, as it is without ``torch.compile`` around it.

    Raises:
        TypeError: There is none.
    """
    unet = unwrapped(getattr(pipe, "unet", pipe))
    called_as = positions(type(unet)) if isinstance(unet, nn.Module) else {}
    if not hasattr(unet, "set_attn_processor") or not {"sample", "timestep"} <= called_as.keys():
        raise TypeError(
            f"expected a diffusers pipeline with a UNet (SD 1.x, 2.x, SDXL) or a UNet, not {type(pipe).__name__}"
        )
    return unet


def denoiser_of(pipe: Any) -> nn.Module:
    """The UNet or transformer that denoises in a pipeline, or such a model itself, with ``torch.compile`` around it.

    Raises:
        TypeError: There is none.
    """
    model = getattr(pipe, "unet", getattr(pipe, "transformer", pipe))
    called_as = positions(type(unwrapped(model))) if isinstance(model, nn.Module) else {}
    denoises = "timestep" in called_as and ("sample" in called_as or "hidden_states" in called_as)
    if not isinstance(model, nn.Module) or not denoises or "controlnet_cond" in called_as:
        raise TypeError(
            "expected a diffusers pipeline with a UNet or a transformer that is called with latents and a timestep, "
            f"or such a model, not {type(pipe).__name__}"
        )
    return model


def controlnets_of(pipe: Any) -> list[nn.Module]:
    """The ControlNets of a pipeline, each once."""
    controlnet = getattr(pipe, "controlnet", None)
    nets = dict.fromkeys(getattr(controlnet, "nets", None) or [controlnet])  # one net may stand there twice
    return [net for net in nets if isinstance(net, nn.Module)]


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """The UNet and ControlNets of a pipeline, or the model itself, by name."""
    if not hasattr(pipe, "unet"):
        try:
            return {"model": unet_of(pipe)}
        except TypeError:
            raise TypeError(
                "expected a diffusers pipeline with a UNet (SD 1.x, 2.x, SDXL) or a transformer (PixArt, SD3, Flux), "
                f"or such a model, not {type(pipe).__name__}"
            ) from None
    models = {"unet": unet_of(pipe)}
    for index, net in enumerate(controlnets_of(pipe)):
        models[f"controlnet{index or ''}"] = net
    return models


def attention_levels(unet: nn.Module) -> tuple[int, ...]:
    """The downsamples at which an SD UNet has self-attention, finest first: SDXL has none at 1."""
    down_blocks = list(getattr(unet, "down_blocks", ()))
    levels = {2**index for index, block in enumerate(down_blocks) if hasattr(block, "attentions")}
    if hasattr(getattr(unet, "mid_block", None), "attentions"):
        levels.add(2 ** (len(down_blocks) - 1))
    return tuple(sorted(levels))


def downsample_of(unet: nn.Module, name: str) -> int | None:
    """The downsample at which a layer of an SD UNet or ControlNet runs, by the layer's name; ``None`` elsewhere."""
    kind, _, rest = name.partition(".")
    number, inmost = rest.partition(".")[0], len(getattr(unet, "down_blocks", ())) - 1
    if kind == "mid_block" and inmost >= 0:
        return 2**inmost
    if kind not in ("down_blocks", "up_blocks") or not number.isdecimal():
        return None
    return int(2 ** (int(number) if kind == "down_blocks" else inmost - int(number)))


def finest_level(unet: nn.Module) -> int:
    """The first of :func:`attention_levels`; 1 if there is none."""
    return next(iter(attention_levels(unet)), 1)


def finest_self_attention(unet: nn.Module) -> dict[str, nn.Module]:
    """The self-attention layers of an SD UNet's transformer blocks at :func:`finest_level`, by name."""
    down_blocks, up_blocks = list(getattr(unet, "down_blocks", ())), list(getattr(unet, "up_blocks", ()))
    level = finest_level(unet).bit_length() - 1
    inmost = ["mid_block."] if level == len(down_blocks) - 1 else []
    stages = (f"down_blocks.{level}.", f"up_blocks.{len(up_blocks) - 1 - level}.", *inmost)
    layers = unwrapped(unet).named_modules()
    return {name: layer for name, layer in layers if name.endswith(".attn1") and name.startswith(stages)}


def attends_over_frames(name: str) -> bool:
    """True for a layer of a video model whose tokens are frames, by the layer's name."""
    kinds = "motion_modules.", "temp_attentions.", "transformer_in.", "temporal_transformer_blocks."
    return any(kind in name for kind in kinds)


def owners_of_hooks(model: nn.Module, kind: type[Owner]) -> list[Owner]:
    """The objects of a class whose methods are forward pre-hooks on a model, or on a compiled model's two modules."""
    hooks = [hook for module in {model, unwrapped(model)} for hook in module._forward_pre_hooks.values()]
    return [owner for owner in (getattr(hook, "__self__", None) for hook in hooks) if isinstance(owner, kind)]
