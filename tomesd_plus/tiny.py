"""The embedded pipeline: a small but real Stable Diffusion, inside the package."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

TINY_PIPELINE = Path(__file__).parent / "assets" / "tiny_pipeline"


def load_tiny_pipeline(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> StableDiffusionPipeline:
    """Load the embedded text-to-image pipeline: 64 × 64 pictures of emoji on coloured backgrounds.

    It knows captions such as "a large red apple on a blue background", "a small dog on the left of a pink striped
    background" and "a small star and a small moon on a purple gradient background"; see the model card beside its
    files. It needs no network; two CPU cores train it in about 100 minutes with ``examples/train_tiny``.

    Args:
        dtype: Of all its models. The files are fp16.
        device: Where to load it.
    """
    pipe = StableDiffusionPipeline.from_pretrained(TINY_PIPELINE, local_files_only=True, safety_checker=None)
    return pipe.to(device, dtype)
