"""Write what training gave as the package embeds it: fp16, readable by everybody, by transformers 4 and 5 alike."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tomesd_plus.evaluation.scoring.reference import save_statistics
from tomesd_plus.metrics import ClipFeatures, Statistics

from .data import held_out_scenes, picture_batch

CAPTIONS_SHARE = 4  # of the reference's captions, every fourth is in the list of captions to generate from
REFERENCE_SEED = (0, 12)


def export(pipeline: StableDiffusionPipeline, clip: CLIPModel, folder: Path, pictures: int) -> None:
    """Save pipeline, CLIP, captions and statistics of held-out pictures.

    Args:
        pipeline: Saved as ``tiny_pipeline``.
        clip: Saved as ``tiny_clip``, with the pipeline's tokenizer.
        folder: Where they go.
        pictures: How many held-out pictures ``tiny_reference.npz`` rests on; a fourth of their captions goes to
            ``held_out_captions.txt``.
    """
    save_pipeline(pipeline, folder / "tiny_pipeline")
    save_clip(clip, pipeline.tokenizer, folder / "tiny_clip")
    scenes = held_out_scenes(pictures)
    captions = [scene.caption for scene in scenes[::CAPTIONS_SHARE]]
    (folder / "held_out_captions.txt").write_text("\n".join(captions) + "\n")
    images = to_uint8(picture_batch(scenes, pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
                                    REFERENCE_SEED))  # fmt: skip
    features = ClipFeatures.load(folder / "tiny_clip").of_images(images)
    save_statistics(Statistics.of(features), folder / "tiny_reference.npz", features=features.half().numpy())
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save in fp16."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    # transformers 5 dropped a prefix of the names; it still reads it, transformers 4 needs it
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    _add_vocabulary(folder / "tokenizer")


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save in fp16, with its tokenizer and what prepares its pictures."""
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _add_vocabulary(folder)
    size = clip.config.vision_config.image_size
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size, image_mean=[0.5] * 3,
                          image_std=[0.5] * 3).save_pretrained(folder)  # fmt: skip


def to_uint8(pictures: Tensor) -> Tensor:
    """From [-1, 1] to 0 … 255, as a picture file holds it."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).byte()


def _add_vocabulary(folder: Path) -> None:
    """Write the two files that transformers 4 reads a tokenizer from and transformers 5 no longer writes."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = (" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
