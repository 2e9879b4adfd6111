"""Names of models, schedulers and devices, for records of what was measured where."""

from typing import Any

import torch
from torch import nn

from tomesd_plus.host.models import unwrapped


def model_name(model: nn.Module) -> str:
    """A denoiser's class and its number of parameters."""
    inner = unwrapped(model)
    return f"{type(inner).__name__}, {sum(each.numel() for each in inner.parameters()) / 1e6:.1f} M parameters"


def scheduler_name(scheduler: Any) -> str:
    """A scheduler's class, and where it tells them its order, spacing, prediction, shift and kind of noise levels."""
    config = getattr(scheduler, "config", {})
    parts = [solver_name(scheduler)]
    parts += [f"{config.get('solver_type')} {config['solver_order']}"] if "solver_order" in config else []
    parts += [str(config[name]) for name in ("timestep_spacing", "prediction_type") if config.get(name)]
    parts += [f"shift {config['shift']:g}"] if isinstance(config.get("shift"), (int, float)) else []
    return ", ".join(parts)


def solver_name(scheduler: Any) -> str:
    """A scheduler's class, and what of its options makes another solver of it."""
    config = getattr(scheduler, "config", {})
    kinds = {"use_karras_sigmas": "Karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
    parts = [type(scheduler).__name__, *(kind for name, kind in kinds.items() if config.get(name))]
    return ", ".join(parts + (["SDE"] if "sde" in str(config.get("algorithm_type")) else []))


def device_name(model: nn.Module) -> str:
    """The device that a model lies on, and its data type."""
    parameter = next(model.parameters())
    device = parameter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return f"{name}, {str(parameter.dtype).removeprefix('torch.')}"
