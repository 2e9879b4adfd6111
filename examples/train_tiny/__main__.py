"""Train CLIP, autoencoder and UNet in turn, then write the files that the package embeds."""

import argparse
from pathlib import Path

from transformers import CLIPModel, CLIPTextModel

from .export import export
from .presets import PRESETS
from .train_clip import train_clip
from .train_unet import make_pipeline, train_unet
from .train_vae import train_vae


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.train_tiny", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="sizes and training times")
    parser.add_argument("--folder", type=Path, default=None, help="checkpoints and result (default: runs/PRESET)")
    parser.add_argument("--only", choices=["clip", "vae"], help="train this model alone (to train both at once)")
    arguments = parser.parse_args()
    preset, folder = PRESETS[arguments.preset], arguments.folder or Path("runs") / arguments.preset
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.only == "vae":
        train_vae(preset, folder)
        return
    clip, tokenizer = train_clip(preset, folder)
    if arguments.only == "clip":
        return
    vae = train_vae(preset, folder)
    unet = train_unet(preset, folder, vae, _text_encoder(clip), tokenizer)
    pipeline = make_pipeline(unet, vae, _text_encoder(clip), tokenizer)
    export(pipeline, clip, folder / "assets", preset.reference_pictures)
    print(f"saved {folder / 'assets'}")


def _text_encoder(clip: CLIPModel) -> CLIPTextModel:
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder.eval()


if __name__ == "__main__":
    main()
