"""Pipelines that begin with a picture."""

from functools import partial

import torch
from conftest import WIDTH, make_pipeline, make_unet
from diffusers import (
    DDPMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from pipeline_tools import Row, call, cells, check, draw, noise, of, slow
from test_pipelines_text_to_image import sdxl_unet

PICTURE = noise(1, 3, 32, 32)
MASK = (torch.arange(32) < 16).float().expand(1, 1, 32, 32)


def refiner():
    """As SDXL's refiner: one text encoder, and a score of aesthetics among the conditions."""
    unet = sdxl_unet(cross_attention_dim=WIDTH, projection_class_embeddings_input_dim=5 * 8 + WIDTH)
    return of(StableDiffusionXLImg2ImgPipeline, "sdxl", unet=unet, text_encoder=None, tokenizer=None,
              requires_aesthetics_score=True)  # fmt: skip


def upscaler():
    unet = make_unet(in_channels=7, num_class_embeds=1000)
    return of(StableDiffusionUpscalePipeline, unet=unet, low_res_scheduler=DDPMScheduler(), max_noise_level=350)


inpaint = partial(draw, image=PICTURE, mask_image=MASK)
change = partial(call, image=PICTURE, strength=1.0)

ROWS = [
    Row("SD 1.x image to image", lambda: make_pipeline("img2img"), partial(draw, num_inference_steps=4)),
    Row("SD 1.x inpainting, 4 channels", lambda: of(StableDiffusionInpaintPipeline), inpaint),
    Row("SD 1.x inpainting, 9 channels",
        lambda: of(StableDiffusionInpaintPipeline, unet=make_unet(in_channels=9)), inpaint),
    slow(Row("SDXL image to image", lambda: of(StableDiffusionXLImg2ImgPipeline, "sdxl", unet=sdxl_unet()), change,
             level=4)),
    slow(Row("SDXL inpainting", lambda: of(StableDiffusionXLInpaintPipeline, "sdxl", unet=sdxl_unet()), inpaint,
             level=4)),
    slow(Row("SDXL refiner", refiner, change, level=4)),
    Row("InstructPix2Pix", lambda: of(StableDiffusionInstructPix2PixPipeline, unet=make_unet(in_channels=8)),
        partial(call, image=PICTURE)),
    Row("×4 upscaling", upscaler, partial(call, image=noise(1, 3, 16, 16))),
    Row("Depth to image",
        lambda: of(StableDiffusionDepth2ImgPipeline, unet=make_unet(in_channels=5), depth_estimator=None),
        partial(call, image=PICTURE, depth_map=noise(1, 32, 32), strength=1.0)),
]  # fmt: skip


@cells(ROWS)
def test_cell(row, way, record_property):
    check(row, way, record_property)
