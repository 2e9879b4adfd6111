"""Load a pipeline: the embedded one, or from the hub, a folder or a checkpoint file."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForText2Image, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

from tomesd_plus.evaluation.errors import ModelError
from tomesd_plus.evaluation.generation.devices import local_device
from tomesd_plus.evaluation.generation.schedulers import scheduler_by_name
from tomesd_plus.evaluation.names import TINY
from tomesd_plus.tiny import load_tiny_pipeline

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def usual_guidance(model: str) -> float:
    """The default guidance scale of a model: 3 for the embedded pipeline, as in its model card, else 7.5."""
    return 3.0 if model == TINY else 7.5


def load_model(
    name: str = TINY,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    safety_checker: bool = True,
    scheduler: str | None = None,
) -> Any:
    """Load a text-to-image pipeline whose denoiser is a UNet.

    Args:
        name: ``"tiny"`` for the embedded pipeline, a hub id, a folder in diffusers' layout, or a ``.safetensors``
            file in the original layout of SD 1.x, 2.x or SDXL (its configuration comes from the hub). Weights are
            read from safetensors only, and no code that comes with a model is run.
        device: PyTorch's name of the device; see :func:`~.devices.local_device`. A GPU becomes the current device.
        dtype: The dtype of all its models.
        safety_checker: Keep the safety checker, if the model has one. In comparisons it would remove images.
        scheduler: In place of the model's own, as :func:`~.schedulers.scheduler_by_name` takes it.

    Raises:
        ModelError: It cannot be found or read, it has no UNet, or there is no such scheduler.
    """
    device = local_device(device)
    # not "dtype", which the oldest supported diffusers does not know
    options: dict[str, Any] = {"torch_dtype": dtype}
    try:
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(torch.device(device))
        if name == TINY:
            pipe = load_tiny_pipeline(dtype, device)
        elif name.lower().endswith(PICKLES):
            raise ValueError("such a file may run any code when it is read: convert it to .safetensors first")
        elif name.endswith(".safetensors"):
            if not Path(name).is_file():
                raise FileNotFoundError("there is no such file")
            pipe = _single_file_class(name).from_single_file(name, **options)
        else:
            _refuse_code(Path(name))
            pipe = AutoPipelineForText2Image.from_pretrained(name, use_safetensors=True, **options)
        if not hasattr(pipe, "unet"):
            raise ValueError(f"{type(pipe).__name__} has no UNet; SD 1.x, 2.x and SDXL have")
        if not safety_checker and getattr(pipe, "safety_checker", None) is not None:
            pipe.safety_checker = None
            pipe.register_to_config(requires_safety_checker=False)
        pipe = pipe.to(device)
    except Exception as error:  # loaders of unknown files raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"cannot load model {name!r}: {reason[:300]}") from error
    if scheduler is not None:
        pipe.scheduler = scheduler_by_name(scheduler, pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _single_file_class(name: str) -> Any:
    with safe_open(name, "pt") as file:
        names = list(file.keys())
    if any(name.startswith("conditioner.embedders.1.") for name in names):  # SDXL's second text encoder
        return StableDiffusionXLPipeline
    return StableDiffusionPipeline


def _refuse_code(folder: Path) -> None:
    """Older hosts, diffusers 0.35 among them, run a component's own code from a local folder without asking."""
    if code := next(folder.glob("*/*.py"), None):
        raise ValueError(f"its folder holds code, {code.relative_to(folder)}, which is not run: take it away first")
