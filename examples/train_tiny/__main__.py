"""Train CLIP, autoencoder and UNet in turn, then save the pipeline as ``load_tiny_pipeline`` expects it."""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel

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
    save(make_pipeline(unet, vae, _text_encoder(clip), tokenizer), folder / "pipeline")
    clip.half().save_pretrained(folder / "clip_model")
    print(f"saved {folder / 'pipeline'}")


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save in fp16, readable by everybody, and by transformers 4 and 5 alike."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    # transformers 5 dropped a prefix of the names and two files; it still reads both, transformers 4 needs them
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = (" ".join(merge) for merge in model["merges"])
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _text_encoder(clip: CLIPModel) -> CLIPTextModel:
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder.eval()


if __name__ == "__main__":
    main()
