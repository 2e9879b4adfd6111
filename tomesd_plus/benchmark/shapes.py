"""Models with the shapes of published ones and random weights, because time depends on shapes only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

LATENT_PIXELS = 8  # image pixels per latent, in each direction
TEXT_TOKENS = 77
POOLED_TEXT = 1280  # channels of SDXL's pooled prompt
TIME_IDS = 6
PATCH = 2  # latents per token of a transformer, in each direction


@dataclass(frozen=True)
class Shape:
    """A model's configuration.

    Args:
        config: Arguments of the model's class, from the published model.
        image_size: Height and width of the images that the model was trained on, pixels.
        model: Its class.
        text_tokens: That it is usually given.
    """

    config: dict[str, Any]
    image_size: int = 512
    model: type[nn.Module] = UNet2DConditionModel
    text_tokens: int = TEXT_TOKENS

    @property
    def is_transformer(self) -> bool:
        """False for a UNet."""
        return self.model is not UNet2DConditionModel

    def grid(self, size: int) -> tuple[int, int]:
        """Height and width of level 1 for an image of a size in pixels: in latents, or in a transformer's tokens.

        Example:
            >>> SHAPES["sd15"].grid(512), SHAPES["sd3"].grid(1024)
            ((64, 64), (64, 64))
        """
        side = size // LATENT_PIXELS // (PATCH if self.is_transformer else 1)
        return side, side

    @property
    def finest(self) -> int:
        """The smallest downsample at which there is self-attention."""
        if self.is_transformer:
            return 1
        return 2 ** next(i for i, kind in enumerate(self.config["down_block_types"]) if kind.startswith("Cross"))


def _unet(attention: str, **config: Any) -> dict[str, Any]:
    """A configuration; ``attention`` has an x or - for each resolution, from the finest: attention or none."""
    blocks = ["CrossAttn" if mark == "x" else "" for mark in attention]
    return {
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "down_block_types": tuple(f"{block}DownBlock2D" for block in blocks),
        "up_block_types": tuple(f"{block}UpBlock2D" for block in reversed(blocks)),
        **config,
    }


SHAPES = {
    "sd15": Shape(
        _unet("xxx-", block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768)
    ),
    "sd21": Shape(
        _unet(
            "xxx-",
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        ),
        image_size=768,
    ),
    "sdxl": Shape(
        _unet(
            "-xx",
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=POOLED_TEXT + TIME_IDS * 256,
        ),
        image_size=1024,
    ),
    "pixart": Shape(  # PixArt-Σ XL 1024
        {
            "num_layers": 28,
            "sample_size": 128,
            "caption_channels": 4096,
            "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
        image_size=1024,
        model=PixArtTransformer2DModel,
        text_tokens=300,
    ),
    "sd3": Shape(  # Stable Diffusion 3 medium
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        image_size=1024,
        model=SD3Transformer2DModel,
        text_tokens=333,
    ),
    "flux-blocks": Shape(  # of FLUX.1's width, but of its 19 double and 38 single blocks only so many
        {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True},
        image_size=1024,
        model=FluxTransformer2DModel,
        text_tokens=512,
    ),
    "tiny": Shape(  # for tests
        _unet(
            "xx",
            block_out_channels=(16, 32),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=16,
            norm_num_groups=8,
        ),
        image_size=64,
    ),
}


def build_unet(shape: Shape, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """Build a model with random weights directly on the device and in the dtype; the weights are reproducible."""
    with torch.random.fork_rng(), _default_dtype(dtype), torch.device(device):
        torch.manual_seed(0)
        return shape.model(**shape.config).eval().requires_grad_(False)


def make_inputs(shape: Shape, size: int, batch: int, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """Random inputs of the model as a pipeline would pass them, except the timestep: see :func:`call_model`.

    Args:
        shape: Shape of the model.
        size: Height and width of the image, pixels.
        batch: Batch size, which includes both guidance branches.
        dtype: The dtype of all tensors.
        device: The device of all tensors.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(batch, *sizes, generator=generator).to(device, dtype)

    if shape.is_transformer:
        return _transformer_inputs(shape, size, batch, dtype, device, random)
    inputs: dict[str, Any] = {
        "sample": random(shape.config["in_channels"], size // LATENT_PIXELS, size // LATENT_PIXELS),
        "encoder_hidden_states": random(TEXT_TOKENS, shape.config["cross_attention_dim"]),
    }
    if "addition_embed_type" in shape.config:
        time_ids = torch.tensor([size, size, 0, 0, size, size]).expand(batch, -1).to(device, dtype)
        inputs["added_cond_kwargs"] = {"text_embeds": random(POOLED_TEXT), "time_ids": time_ids}
    return inputs


def call_model(model: Any, shape: Shape, inputs: dict[str, Any], timestep: Tensor) -> Any:
    """Call a model as a pipeline would.

    Args:
        model: Of the shape.
        shape: Its shape.
        inputs: From :func:`make_inputs`.
        timestep: Of the scheduler, 0-d.
    """
    if not shape.is_transformer:
        more = {name: value for name, value in inputs.items() if name != "sample"}
        return model(inputs["sample"], timestep, **more, return_dict=False)  # tomesd takes no keywords for these
    each = timestep.expand(len(inputs["hidden_states"]))
    if shape.model is FluxTransformer2DModel:
        each = each.to(inputs["hidden_states"].dtype) / 1000
    return model(**inputs, timestep=each, return_dict=False)


def _transformer_inputs(
    shape: Shape,
    size: int,
    batch: int,
    dtype: torch.dtype,
    device: str | torch.device,
    random: Callable[..., Tensor],
) -> dict[str, Any]:
    rows, columns = shape.grid(size)
    inputs: dict[str, Any] = {"encoder_hidden_states": random(shape.text_tokens, 4096)}
    if shape.model is FluxTransformer2DModel:
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        ids = torch.stack([torch.zeros_like(y), y, x], dim=-1).flatten(0, 1)
        return inputs | {
            "hidden_states": random(rows * columns, 64),
            "pooled_projections": random(768),
            "guidance": torch.full((batch,), 3.5).to(device, dtype),
            "img_ids": ids.to(device, dtype),
            "txt_ids": torch.zeros(shape.text_tokens, 3).to(device, dtype),
        }
    channels = 4 if shape.model is PixArtTransformer2DModel else 16
    inputs["hidden_states"] = random(channels, rows * PATCH, columns * PATCH)
    if shape.model is SD3Transformer2DModel:
        inputs["pooled_projections"] = random(2048)
    return inputs


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
