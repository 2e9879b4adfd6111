"""UNets with the shapes of published models and random weights, because time depends on shapes only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

LATENT_PIXELS = 8  # image pixels per latent, in each direction
TEXT_TOKENS = 77
POOLED_TEXT = 1280  # channels of SDXL's pooled prompt
TIME_IDS = 6


@dataclass(frozen=True)
class Shape:
    """A UNet's configuration.

    Args:
        config: Arguments of diffusers' ``UNet2DConditionModel``, from the published model.
        image_size: Height and width of the images that the model was trained on, pixels.
    """

    config: dict[str, Any]
    image_size: int = 512

    @property
    def finest(self) -> int:
        """The smallest downsample at which there is self-attention."""
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
    """Build a UNet with random weights directly on the device and in the dtype; the weights are reproducible."""
    with torch.random.fork_rng(), _default_dtype(dtype), torch.device(device):
        torch.manual_seed(0)
        return UNet2DConditionModel(**shape.config).eval().requires_grad_(False)


def make_inputs(shape: Shape, size: int, batch: int, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """Random inputs of the UNet as a pipeline would pass them, except the timestep.

    Args:
        shape: Shape of the UNet.
        size: Height and width of the image, pixels.
        batch: Batch size, which includes both guidance branches.
        dtype: The dtype of all tensors.
        device: The device of all tensors.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(batch, *sizes, generator=generator).to(device, dtype)

    inputs: dict[str, Any] = {
        "sample": random(shape.config["in_channels"], size // LATENT_PIXELS, size // LATENT_PIXELS),
        "encoder_hidden_states": random(TEXT_TOKENS, shape.config["cross_attention_dim"]),
    }
    if "addition_embed_type" in shape.config:
        time_ids = torch.tensor([size, size, 0, 0, size, size]).expand(batch, -1).to(device, dtype)
        inputs["added_cond_kwargs"] = {"text_embeds": random(POOLED_TEXT), "time_ids": time_ids}
    return inputs


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
