"""The autoencoder: 32 × 32 × 4 latents, squared error and a light pull to the unit normal."""

import math
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .data import held_out_scenes, picture_batch, scenes
from .loop import Clock, train
from .presets import Preset

KL_WEIGHT = 1e-5  # of a position's divergence from the unit normal: keeps the latents' scale, costs little sharpness


def make_vae(preset: Preset) -> AutoencoderKL:
    """The model with random weights. No attention in the middle, so that it may be trained on crops."""
    levels = len(preset.vae_channels)
    return AutoencoderKL(
        block_out_channels=preset.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=preset.image_size,
        mid_block_add_attention=False,
    )


def train_vae(preset: Preset, folder: Path, seed: int = 0) -> AutoencoderKL:
    """Train on random quarters of pictures, then set the scaling factor so that latents have unit variance."""
    torch.manual_seed(seed)
    vae = make_vae(preset)

    def loss_of(model: Any, crops: Tensor, clock: Clock) -> Tensor:
        crops = crops.to(next(model.parameters()).device)
        posterior = model.encode(crops).latent_dist
        decoded = model.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).sum((1, 2, 3)).mean()
        return (decoded - crops).square().mean() + KL_WEIGHT * kl / crops[0, 0].numel()

    make = partial(_quarters, max(1, preset.vae_batch // 4), preset.image_size, seed)
    trained: Any = train(vae, loss_of, folder / "vae", preset.vae_minutes, 2e-3, make=make, workers=preset.workers)
    with torch.no_grad():
        pixels = picture_batch(list(islice(scenes((seed, 6)), 64)), preset.image_size, (seed, 6)).to(trained.device)
        latents = trained.encode(pixels).latent_dist.sample()
    trained.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    print(f"vae: {reconstruction_psnr(trained, preset):.2f} dB on held-out pictures, latents' std {latents.std():.3f}")
    return cast(AutoencoderKL, trained)


def _quarters(count: int, size: int, seed: int, step: int) -> Tensor:
    """Each picture gives four quarters, at a random corner: as many pixels from a quarter of the drawing."""
    pixels = picture_batch(list(islice(scenes((seed, 3, step)), count)), size, (seed, 4, step))
    shift = np.random.default_rng((seed, 5, step)).integers(0, size, size=2)
    half = size // 2
    crops = pixels.roll(shift.tolist(), dims=(2, 3)).unfold(2, half, half).unfold(3, half, half)
    return crops.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, half, half)  # from (count, 3, 2, 2, half, half)


@torch.no_grad()
def reconstruction_psnr(vae: Any, preset: Preset, count: int = 128) -> float:
    """Mean PSNR in dB of held-out pictures after encoding (mode of the posterior) and decoding."""
    pixels = picture_batch(held_out_scenes(count), preset.image_size, 7).to(vae.device)
    error = (vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1) - pixels).square().mean((1, 2, 3))
    return float(np.mean([10 * math.log10(4 / e) for e in error.tolist()]))
