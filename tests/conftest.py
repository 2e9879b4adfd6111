"""Tiny random pipelines of the real classes: made once, copied for each test."""

import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported: no test uses a network
os.environ.pop("COLUMNS", None)  # before rich is: tests set a width of their own
if (_workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:  # before torch: the cores are shared
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))
sys.path.insert(0, str(Path(__file__).parents[1]))  # for the examples

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tomesd_plus import ToMeProcessor, load_tiny_pipeline
from tomesd_plus.vision.versions import is_too_old

WIDTH = 16  # of the text encoders
# Merging in vision towers is refused with older ones. There is one conftest: tests import from it by this name.
collect_ignore_glob = ["vision/test_*.py"] if is_too_old() else []


def make_unet(**overrides: Any) -> UNet2DConditionModel:
    """A UNet with self-attention at downsample 1 and 2."""
    torch.manual_seed(0)
    options = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(options | overrides)).eval()


def _tokenizer() -> CLIPTokenizer:
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(f"{c}</w>" for c in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as name:  # from files: transformers 4 and 5 both read them
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
        return CLIPTokenizer.from_pretrained(folder)


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip


def _make(kind: str) -> Any:
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    config = _text_config(tokenizer)
    parts: dict[str, Any] = {
        "vae": _vae(),
        "text_encoder": CLIPTextModel(config),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
    }
    if kind == "sdxl":
        parts["unet"] = make_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH, transformer_layers_per_block=2,
        )  # fmt: skip
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(config), "tokenizer_2": tokenizer}
        return StableDiffusionXLPipeline(**parts)
    parts["unet"] = make_unet()
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if kind == "img2img":
        return StableDiffusionImg2ImgPipeline(**parts)
    if kind == "controlnet":
        controlnet = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 8))
        for layer in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
            torch.nn.init.normal_(layer.weight, std=0.5)  # zero as built, so that it would change nothing
        return StableDiffusionControlNetPipeline(**parts, controlnet=controlnet)
    return StableDiffusionPipeline(**parts)


_made: dict[str, Any] = {}


def make_pipeline(kind: str) -> Any:
    """A fresh copy of a pipeline: sd, sdxl, img2img or controlnet."""
    if kind not in _made:
        _made[kind] = _make(kind)
        _made[kind].set_progress_bar_config(disable=True)
    return copy.deepcopy(_made[kind])


def generate(pipe: Any, seed: int = 0, prompt: str | list[str] = "a cat", **options: Any) -> torch.Tensor:
    """Run any of the pipelines: pixels (batch, 3, height, width)."""
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    kind = type(pipe).__name__
    extra: dict[str, Any] = {"height": 32, "width": 32}
    if "Img2Img" in kind:
        extra = {"image": picture, "strength": 0.8}
    elif "ControlNet" in kind:
        extra |= {"image": picture}
    call = extra | {"num_inference_steps": 4, "guidance_scale": 5.0} | options
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="pt", **call).images


def _switch_guidance_off(pipe, step, timestep, tensors):
    if step == 1:
        pipe._guidance_scale = 1.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
    return tensors


GUIDANCE_SWITCHED_OFF = {  # in mid-run: options of a pipeline's call
    "callback_on_step_end": _switch_guidance_off,
    "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
}


def saved_and_loaded(pipe: Any, folder: Path) -> Any:
    """The pipeline that a folder holds after ``save_pretrained``."""
    pipe.save_pretrained(folder)
    loaded = type(pipe).from_pretrained(folder, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return make_pipeline("sd")


@pytest.fixture(params=["sd", "sdxl", "img2img", "controlnet"])
def any_pipe(request: pytest.FixtureRequest) -> Any:
    return make_pipeline(request.param)


def level_of(pipe: Any) -> int:
    """The finest level at which a pipeline's UNet has self-attention."""
    return 2 if "XL" in type(pipe).__name__ else 1


def hooks(pipe: Any) -> list[str]:
    """Names of the modules of a pipeline's UNet and ControlNet that carry forward hooks."""
    return [
        name
        for component in ("unet", "controlnet")
        for name, module in (getattr(pipe, component, None) or torch.nn.Module()).named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]


# One layer alone -----------------------------------------------------------------------------------------------------

INPUTS = {  # of a UNet
    "sample": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
    "encoder_hidden_states": torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1)),
}


def attention_layer(heads=2):
    torch.manual_seed(0)
    return Attention(16, heads=heads, dim_head=8, processor=AttnProcessor2_0()).eval(), torch.randn(2, 64, 16)


class OneLayer(torch.nn.Module):
    """An attention layer that is called with an 8 × 8 grid of tokens at noise level 1."""

    def __init__(self, attn):
        super().__init__()
        attn.set_processor(AttnProcessor2_0())
        self.attn = attn

    def forward(self, x):
        return self.attn(x)


class Timed(torch.nn.Module):
    """Has a UNet's signature."""

    def forward(self, sample, timestep):
        return sample


def merge_in(model, size=(8, 8), **options):
    """Merge in a model that is a few attention layers or one block, at noise level 1; returns the attachment."""
    attentions = [m for m in model.modules() if isinstance(m, Attention) and not m.is_cross_attention]
    processor = ToMeProcessor(inner=attentions[0].processor, **options)
    for attn in attentions:
        attn.set_processor(processor)
    processor.attachment.attach(torch.nn.ModuleList([model]), attentions)
    begin_call(processor.attachment, size)
    return processor.attachment


def begin_call(attachment, size=(8, 8), timestep=999):
    """As at the beginning of a model's call with latents of a size."""
    attachment.begin_call(Timed(), (torch.zeros(2, 4, *size), timestep), {})


def plans_of(attachment):
    """The plans of the latest call, by level, …"""
    return attachment.decider.current.call.plans


# The comparison app -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def app_backend() -> Any:
    """The backend of :func:`app_url`."""
    from gradio_app.backend import Backend

    pipe = load_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return Backend(pipe)


@pytest.fixture(scope="session")
def app_url(app_backend: Any) -> Iterator[str]:
    """The address of a running app with the embedded pipeline."""
    pytest.importorskip("gradio")
    from gradio_app.ui import build_demo, launch_options

    demo = build_demo(app_backend)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield url
    demo.close()
