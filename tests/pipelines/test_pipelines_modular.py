"""Modular Stable Diffusion XL, with each guider that the host runs untouched."""

import inspect
from functools import partial

import diffusers
import pytest
import torch
from conftest import make_pipeline
from pipeline_tools import Row, cells, check
from test_pipelines_text_to_image import sdxl_unet

try:
    from diffusers.guiders import BaseGuidance
    from diffusers.guiders.smoothed_energy_guidance import SmoothedEnergyGuidanceConfig
    from diffusers.hooks import LayerSkipConfig
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
except ImportError as error:
    pytest.skip(f"this host has no guiders as they are used here: {error}", allow_module_level=True)

STACK = {"indices": [0], "fqn": "mid_block.attentions.0.transformer_blocks"}
ATTENTION = LayerSkipConfig(**STACK, skip_attention=False, skip_attention_scores=True, skip_ff=False)
LAYERS = {  # of the guiders that change some: what they are given
    "PerturbedAttentionGuidance": {"perturbed_guidance_config": ATTENTION, "perturbed_guidance_stop": 1.0},
    "SkipLayerGuidance": {"skip_layer_config": LayerSkipConfig(**STACK), "skip_layer_guidance_stop": 1.0},
    "AutoGuidance": {"auto_guidance_config": LayerSkipConfig(**STACK)},
    "SmoothedEnergyGuidance": {"seg_guidance_config": SmoothedEnergyGuidanceConfig(**STACK)},
}
HOST_CANNOT = {
    "FrequencyDecoupledGuidance": "its library kornia is not installed",
    "MagnitudeAwareGuidance": "linalg.matrix_norm fails in it",
}


def modular(guider=None):
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    parts = make_pipeline("sdxl").components | {"unet": sdxl_unet()}
    known = set(pipe.component_names)
    pipe.update_components(**{name: part for name, part in parts.items() if name in known and part is not None})
    if guider is not None:
        pipe.update_components(guider=guider(**LAYERS.get(guider.__name__, {})))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe):
    images = pipe(prompt="a cat", negative_prompt="", num_inference_steps=3, height=32, width=32,
                  generator=torch.Generator().manual_seed(0), output_type="pt", output="images")  # fmt: skip
    return torch.as_tensor(images)


GUIDERS = [
    kind for name in sorted(dir(diffusers.guiders)) if inspect.isclass(kind := getattr(diffusers.guiders, name))
    and issubclass(kind, BaseGuidance) and kind is not BaseGuidance
]  # fmt: skip
FAST = ("ClassifierFreeGuidance",)
ROWS = [
    Row(f"Modular SDXL, {kind.__name__}", partial(modular, kind), run, level=4,
        fast=("merging", "cache") if kind.__name__ in FAST else (), host_cannot=HOST_CANNOT.get(kind.__name__, ""))
    for kind in GUIDERS
]  # fmt: skip


@cells(ROWS)
def test_cell(row, way, record_property):
    check(row, way, record_property)
