"""Conditions: what determines an image besides its configuration, prompt and seed."""

import hashlib
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from tomesd_plus.evaluation.file_io import plain
from tomesd_plus.evaluation.generation.sampling import Sampling

LIBRARIES = ("torch", "diffusers", "transformers", "tomesd-plus")


def describe(pipe: Any, model: str, sampling: Sampling) -> dict[str, Any]:
    """Describe the conditions under which images are generated, for their manifest.

    Args:
        pipe: An unmodified pipeline.
        model: The name, path or hub id from which it was loaded.
        sampling: Steps, guidance and size.
    """
    parameter = next(pipe.unet.parameters())
    size = getattr(pipe.unet.config, "sample_size", None)
    own = size * pipe.vae_scale_factor if isinstance(size, int) else None
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "model": model,
        "fingerprint": {name: _fingerprint(module) for name, module in sorted(modules.items())},
        "sampling": {**asdict(sampling), "height": sampling.height or own, "width": sampling.width or own},
        "scheduler": plain({"class": type(pipe.scheduler).__name__, **scheduler}),  # DPM-Solver's has an infinity
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _fingerprint(module: torch.nn.Module) -> str:
    """A hash that identifies a module's weights, from a sample of each tensor; the same on every machine."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        values = tensor.detach().flatten()
        some = values[:: max(1, len(values) // 64)].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
