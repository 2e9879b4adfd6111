"""How large and how long: everything in which one training differs from another."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Sizes and budgets of one training.

    Args:
        image_size: Side of the pictures, pixels. The latents are 32 × 32 at every preset.
        vae_channels: Widths of the autoencoder, one a level; each level but the first halves the resolution.
        unet_channels: Widths of the UNet's three levels.
        clip_width: Width of both towers of the CLIP model and of the UNet's cross-attention.
        clip_layers: Layers of each tower.
        clip_batch, vae_batch, unet_batch: Pictures a step.
        clip_minutes, vae_minutes, unet_minutes: Training time of each model.
        latents: Pictures that are encoded once for the UNet's training.
        reference_pictures: Held-out pictures that the reference statistics rest on.
        workers: Processes that draw pictures ahead; 0: none.
        small_share: Share of the UNet's time that goes to half-size latents first, where a step is four times cheaper.
    """

    image_size: int = 64
    vae_channels: tuple[int, ...] = (32, 64)
    unet_channels: tuple[int, int, int] = (32, 64, 192)
    clip_width: int = 128
    clip_layers: int = 3
    clip_batch: int = 96
    vae_batch: int = 32
    unet_batch: int = 12
    clip_minutes: float = 15
    vae_minutes: float = 15
    unet_minutes: float = 110
    latents: int = 12_000
    reference_pictures: int = 2_000
    small_share: float = 0.45
    workers: int = 0


PRESETS = {
    "smoke": Preset(clip_minutes=0.1, vae_minutes=0.1, unet_minutes=0.2, latents=64, reference_pictures=80,
                    vae_channels=(16, 16), unet_channels=(16, 32, 32), clip_width=32, clip_layers=1),
    "cpu": Preset(),
    "gpu": Preset(image_size=128, vae_channels=(64, 128, 128), unet_channels=(128, 256, 384), clip_width=256,
                  clip_layers=4, clip_batch=512, vae_batch=128, unet_batch=256, clip_minutes=3, vae_minutes=5,
                  unet_minutes=10, latents=60_000, small_share=0.2, workers=12),
}  # fmt: skip
