"""What is read off diffusers' models and pipelines, in one place."""

from typing import Any, TypeVar

from torch import Tensor, nn

Owner = TypeVar("Owner")


def sample_and_timestep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The first two arguments of a UNet's or ControlNet's call, by position or by name."""
    sample = args[0] if args else kwargs["sample"]
    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
    return sample, timestep


def train_timesteps(pipe: Any) -> int:
    """Timesteps of a pipeline's training; 1,000 where its scheduler does not tell, or there is none."""
    config = getattr(getattr(pipe, "scheduler", None), "config", None)
    return getattr(config, "num_train_timesteps", 1000)


def unet_of(pipe: Any) -> nn.Module:
    """The UNet of a pipeline, or the UNet or ControlNet itself, as it is without ``torch.compile`` around it.

    Raises:
        TypeError: There is none.
    """
    unet = getattr(pipe, "unet", pipe)
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, nn.Module) or not hasattr(unet, "set_attn_processor"):
        raise TypeError(
            f"expected a diffusers pipeline with a UNet (SD 1.x, 2.x, SDXL) or a UNet, not {type(pipe).__name__}"
        )
    return unet


def attention_levels(unet: nn.Module) -> tuple[int, ...]:
    """The downsamples at which an SD UNet has self-attention, finest first: SDXL has none at 1."""
    down_blocks = list(getattr(unet, "down_blocks", ()))
    levels = {2**index for index, block in enumerate(down_blocks) if hasattr(block, "attentions")}
    if hasattr(getattr(unet, "mid_block", None), "attentions"):
        levels.add(2 ** (len(down_blocks) - 1))
    return tuple(sorted(levels))


def finest_level(unet: nn.Module) -> int:
    """The first of :func:`attention_levels`; 1 if there is none."""
    return next(iter(attention_levels(unet)), 1)


def owners_of_hooks(model: nn.Module, kind: type[Owner]) -> list[Owner]:
    """The objects of a class whose methods are forward pre-hooks on a model, or on a compiled model's two modules."""
    modules = [model, getattr(model, "_orig_mod", None)]
    hooks = [
        hook for module in modules if isinstance(module, nn.Module) for hook in module._forward_pre_hooks.values()
    ]
    return [owner for owner in (getattr(hook, "__self__", None) for hook in hooks) if isinstance(owner, kind)]
