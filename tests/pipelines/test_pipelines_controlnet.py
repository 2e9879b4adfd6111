"""Networks beside the UNet: ControlNets and T2I-Adapters."""

import copy
import inspect
from functools import partial

import torch
from conftest import make_pipeline, make_unet
from diffusers import (
    ControlNetUnionModel,
    ControlNetXSAdapter,
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetXSPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    T2IAdapter,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from pipeline_tools import Row, call, cells, check, draw, noise, of, slow
from test_pipelines_text_to_image import sdxl_unet

PICTURE = noise(1, 3, 32, 32)


def filled(model):
    """With the layers that are zero as built, so that they would change nothing, filled."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def multi():
    pipe = make_pipeline("controlnet")
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, copy.deepcopy(pipe.controlnet)])
    return pipe


def union():
    unet = sdxl_unet()
    torch.manual_seed(0)
    shared = set(inspect.signature(ControlNetUnionModel.__init__).parameters) & set(unet.config)
    controlnet = ControlNetUnionModel(
        **{name: unet.config[name] for name in shared - {"in_channels"}},
        conditioning_embedding_out_channels=(8, 8),
        num_trans_channel=16,
        num_trans_head=2,
        num_proj_channel=16,
    )
    controlnet = filled(controlnet).eval()
    return of(StableDiffusionXLControlNetUnionPipeline, "sdxl", unet=unet, controlnet=controlnet)


def xs():
    unet = make_unet(layers_per_block=2)
    torch.manual_seed(0)
    controlnet = ControlNetXSAdapter.from_unet(unet, size_ratio=1.0, conditioning_embedding_out_channels=(8, 8))
    return of(StableDiffusionControlNetXSPipeline, unet=unet, controlnet=filled(controlnet))


def adapter():
    torch.manual_seed(0)
    return T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2)


def as_tensor(pipe, **options):
    """It gives arrays, whatever it is asked for."""
    return torch.as_tensor(draw(pipe, **options))


def image_to_image():
    return of(StableDiffusionControlNetImg2ImgPipeline, "controlnet")


ROWS = [
    Row("ControlNet", lambda: make_pipeline("controlnet")),
    Row("ControlNet, guess mode", lambda: make_pipeline("controlnet"), partial(draw, guess_mode=True), fast=()),
    slow(Row("ControlNet image to image", image_to_image,
             partial(draw, image=PICTURE, control_image=PICTURE, strength=0.8, num_inference_steps=4))),
    Row("ControlNet, two", multi, partial(draw, image=[PICTURE, PICTURE])),
    Row("ControlNet Union (SDXL)", union, partial(call, control_image=[PICTURE], control_mode=[0]), level=4),
    Row("ControlNet-XS", xs, partial(draw, image=PICTURE), ways=("merging", "cache", "bare"),
        fast=("merging", "cache", "bare"),
        refuses={"cache": "expected a diffusers pipeline with a UNet or a transformer"}),
    Row("T2I-Adapter", lambda: of(StableDiffusionAdapterPipeline, adapter=adapter()),
        partial(as_tensor, image=PICTURE)),
    slow(Row("T2I-Adapter, two",
             lambda: of(StableDiffusionAdapterPipeline, adapter=MultiAdapter([adapter(), adapter()])),
             partial(as_tensor, image=[PICTURE, PICTURE], adapter_conditioning_scale=[0.5, 0.5]))),
]  # fmt: skip


@cells(ROWS)
def test_cell(row, way, record_property):
    check(row, way, record_property)
