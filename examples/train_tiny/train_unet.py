"""The denoiser: v-prediction in the latent space, captions dropped now and then for classifier-free guidance."""

import hashlib
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import make_image_grid
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from .ahead import ahead
from .data import Scene, held_out_scenes, picture_batch, scenes
from .loop import Clock, train
from .presets import Preset

UNCONDITIONAL_SHARE = 0.1
ENCODED_AT_ONCE = 64
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",  # leaves under 1 % of signal at the last timestep, so background colours are learnt
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "steps_offset": 1,
}


def make_unet(preset: Preset) -> UNet2DConditionModel:
    """The model with random weights: three levels, all with attention, self-attention on 1,024 tokens at the first."""
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=preset.unet_channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=preset.clip_width,
        attention_head_dim=2,  # the number of heads, by diffusers' naming
        norm_num_groups=16,
    )


def make_pipeline(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """A pipeline as a user gets it: DDIM, last timestep included."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", set_alpha_to_one=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_unet(
    preset: Preset,
    folder: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    seed: int = 0,
) -> UNet2DConditionModel:
    """Train on latents that are encoded once, first at half size, then at full size."""
    torch.manual_seed(seed)
    unet = make_unet(preset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae, text_encoder = vae.to(device).requires_grad_(False), text_encoder.to(device).requires_grad_(False)
    schedule = DDPMScheduler(**SCHEDULE)
    dataset = list(islice(scenes((seed, 8)), preset.latents))
    captions = [scene.caption for scene in dataset]
    small = _encoded(vae, dataset, preset.image_size // 2, (seed, 9), folder, preset.workers)
    large = _encoded(vae, dataset, preset.image_size, (seed, 10), folder, preset.workers)
    print(f"unet: {len(dataset)} pictures encoded", flush=True)

    def loss_of(model: nn.Module, batch: None, clock: Clock) -> Tensor:
        rng = np.random.default_rng((seed, 11, clock.step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        latents, count = (
            (small, 2 * preset.unet_batch) if clock.progress < preset.small_share else (large, preset.unet_batch)
        )
        chosen = rng.integers(len(dataset), size=count)
        dropped = rng.random(count) < UNCONDITIONAL_SHARE
        texts = ["" if drop else captions[i] for i, drop in zip(chosen, dropped, strict=True)]
        with torch.no_grad():
            states = text_states(text_encoder, tokenizer, texts)
        mean, std = latents[torch.from_numpy(chosen)].float().to(device).chunk(2, dim=1)
        clean = mean + std * torch.randn(mean.shape, generator=generator).to(device)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        timesteps = _timesteps(count, generator).to(device)
        noisy = schedule.add_noise(clean, noise, timesteps)
        target = schedule.get_velocity(clean, noise, timesteps)
        return (model(noisy, timesteps, states).sample.float() - target).square().mean()

    def sample_sheet(model: nn.Module, clock: Clock) -> None:
        was_training = model.training
        model.eval()
        pipeline = make_pipeline(model, vae, text_encoder, tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        prompts = [scene.caption for scene in held_out_scenes(8)]
        size = preset.image_size if clock.progress >= preset.small_share else preset.image_size // 2
        images = pipeline(prompts, height=size, width=size, num_inference_steps=20, guidance_scale=4.0,
                          generator=torch.Generator().manual_seed(0)).images  # fmt: skip
        make_image_grid(images, rows=2, cols=4).save(folder / "samples.png")
        model.train(was_training)

    return train(unet, loss_of, folder / "unet", preset.unet_minutes, 1e-3, on_save=sample_sheet)


def _timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps in [0, 999], one from each equally likely part; most where shapes are decided (Esser et al. 2024)."""
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (1000 * torch.sigmoid(-0.4 + 1.2 * torch.special.ndtri(spread))).long().clamp(0, 999)


def text_states(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Encode captions as the pipeline does: (batch, 77, width)."""
    tokens = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0]


def _encoded(
    vae: AutoencoderKL, dataset: list[Scene], size: int, seed: tuple[int, ...], folder: Path, workers: int
) -> Tensor:
    """Encode the pictures, or read what an earlier run has left."""
    weights = torch.cat([parameter.detach().flatten() for parameter in vae.parameters()])
    digest = hashlib.sha256(weights.cpu().numpy().tobytes()).hexdigest()[:8]  # latents of another VAE are of no use
    path = folder / f"latents_{size}_{digest}.safetensors"
    if not path.exists():
        new = path.with_suffix(".new")
        save_file({"latents": _encode(vae, dataset, size, seed, workers)}, new)
        new.rename(path)
    return load_file(path)["latents"]


@torch.no_grad()
def _encode(vae: AutoencoderKL, dataset: list[Scene], size: int, seed: tuple[int, ...], workers: int) -> Tensor:
    """Scaled mean and standard deviation of each picture's latents: (pictures, 8, height, width), fp16."""
    parts = []
    for pixels in ahead(partial(_pictures, dataset, size, seed), 0, -(-len(dataset) // ENCODED_AT_ONCE), workers):
        posterior = vae.encode(pixels.to(vae.device)).latent_dist
        parts.append(torch.cat([posterior.mean, posterior.std], dim=1).mul(vae.config.scaling_factor).half().cpu())
    return torch.cat(parts).contiguous()


def _pictures(dataset: list[Scene], size: int, seed: tuple[int, ...], part: int) -> Tensor:
    start = ENCODED_AT_ONCE * part
    return picture_batch(dataset[start : start + ENCODED_AT_ONCE], size, (*seed, start))
