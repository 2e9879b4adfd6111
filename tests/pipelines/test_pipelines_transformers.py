"""Transformers: PixArt, Stable Diffusion 3 and Flux, and one in which tokens are not merged"""

from functools import partial

import torch
from pipeline_tools import Row, cells, check, noise
from transformer_tools import generate, make_controlled, make_image_to_image, make_pipeline

PICTURE = noise(1, 3, 32, 32)


def draw(pipe, **options):
    torch.manual_seed(0)  # the host draws the latents of SD3's control images from no generator
    return generate(pipe, **{"num_inference_steps": 4} | options)


def row(name, make, family, refuses=None, **options):
    ways = ("merging", "skipping", "preset")
    words = {"preset": "this preset caches layers of a UNet"} | (refuses or {})
    return Row(name, lambda: make(family), partial(draw, **options), ways=ways, fast=ways[:2], refuses=words)


guided = {"true_cfg_scale": 4.0, "negative_prompt": "a dog"}
from_picture = {"image": PICTURE, "strength": 1.0}
ROWS = [
    row("PixArt-α", make_pipeline, "pixart-alpha"),
    row("PixArt-Σ", make_pipeline, "pixart-sigma"),
    row("Stable Diffusion 3", make_pipeline, "sd3"),
    row("Stable Diffusion 3 image to image", make_image_to_image, "sd3", **from_picture),
    row("Stable Diffusion 3 with a ControlNet", make_controlled, "sd3", control_image=PICTURE),
    row("Stable Diffusion 3.5", make_pipeline, "sd35"),
    row("Flux", make_pipeline, "flux"),
    row("Flux, true guidance", make_pipeline, "flux", **guided),
    row("Flux image to image", make_image_to_image, "flux", **from_picture),
    row("Flux with a ControlNet", make_controlled, "flux", control_image=PICTURE),
    row("Flux with a ControlNet, true guidance", make_controlled, "flux", control_image=PICTURE, **guided),
    row("Chroma", make_pipeline, "chroma", refuses={"merging": "tokens are merged in the transformers of"},
        negative_prompt="a dog", guidance_scale=4.0),
]  # fmt: skip


@cells(ROWS)
def test_cell(row, way, record_property):
    check(row, way, record_property)
