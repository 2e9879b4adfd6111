"""The embedded pipeline: a small but real Stable Diffusion, inside the package."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ASSETS = Path(__file__).parent / "assets"
TINY_PIPELINE = ASSETS / "tiny_pipeline"
TINY_CLIP = ASSETS / "tiny_clip"
"""A ``CLIPModel`` trained on the same pictures, with tokenizer and image processor; 64 × 64 pixels, 64 dimensions."""
TINY_REFERENCE = ASSETS / "tiny_reference.npz"
"""Of 2,000 held-out pictures, by the tiny CLIP: ``mu``, ``sigma``, ``count``, and ``features`` (2000, 64)."""


def load_tiny_pipeline(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> "StableDiffusionPipeline":
    """Load the embedded text-to-image pipeline: 64 × 64 pictures of emoji on coloured backgrounds.

    It knows captions such as "a large red apple on a blue background", "a small dog on the left of a pink striped
    background" and "a small star and a small moon on a purple gradient background". Use a guidance scale of about 3;
    see the model card beside its files. It needs no network; two CPU cores train it in two hours with
    ``examples/train_tiny``.

    Args:
        dtype: Of all its models. The files are fp16.
        device: Where to load it.
    """
    from diffusers import StableDiffusionPipeline  # not above: it loads much, and transformers prints hints

    pipe = StableDiffusionPipeline.from_pretrained(TINY_PIPELINE, local_files_only=True, safety_checker=None)
    pipe.text_encoder.float()  # transformers keeps the files' dtype, diffusers does not
    pipe = pipe.to(device)
    return pipe if dtype == torch.float32 else pipe.to(dtype)  # the host warns of every change of dtype


def held_out_captions() -> list[str]:
    """500 different captions that training never saw; the reference statistics have the same mixture of them."""
    return (ASSETS / "held_out_captions.txt").read_text().splitlines()
