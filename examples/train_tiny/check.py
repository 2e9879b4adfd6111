"""How good the embedded pipeline is: zero-shot recognition of its pictures, and their distance to real ones."""

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from tomesd_plus import load_tiny_pipeline
from tomesd_plus.evaluation.scoring.reference import load_statistics
from tomesd_plus.metrics import ClipFeatures, Statistics, clip_scores, frechet_distance
from tomesd_plus.tiny import TINY_CLIP, TINY_REFERENCE, held_out_captions

from .data import COLORS, OBJECTS, Scene, held_out_scenes, picture_batch
from .export import CAPTIONS_SHARE, REFERENCE_SEED, to_uint8

FIELDS = ("pictures", "count", "background colour", "object top-1", "object top-5", "CLIP score", "distance")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.train_tiny.check", description=__doc__)
    parser.add_argument("--pictures", type=int, default=500, help="how many to generate, of at most 500 captions")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale")
    parser.add_argument("--out", type=Path, default=Path("results/tiny-pipeline.csv"), help="the table to write")
    arguments = parser.parse_args()
    if not 2 <= arguments.pictures <= len(held_out_captions()):
        parser.error(f"--pictures must lie between 2 and {len(held_out_captions())}")
    scenes = embedded_scenes()[: arguments.pictures]
    pipe, clip = load_tiny_pipeline(), ClipFeatures.load(TINY_CLIP)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    start = time.monotonic()
    made = generate(pipe, [scene.caption for scene in scenes], arguments.steps, arguments.guidance)
    seconds = (time.monotonic() - start) / len(scenes)
    real = to_uint8(picture_batch(scenes, size, (*REFERENCE_SEED, 1)))  # another jitter than the reference's
    noise = torch.randint(256, real.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = [
        measure("generated", made, scenes, clip),
        measure("real, of the same captions (floor)", real, scenes, clip),
        measure(f"real, blurred {size // 8} × {size // 8}", blurred(real, size // 8), scenes, clip),
        measure("noise (ceiling)", noise, scenes, clip),
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    table = Table(
        *FIELDS, title=f"{arguments.steps} steps, guidance {arguments.guidance:g}, {seconds:.1f} s a picture"
    )
    for row in rows:
        table.add_row(*(str(row[field]) for field in FIELDS))
    Console().print(table)


def embedded_scenes() -> list[Scene]:
    """The scenes of the 500 embedded captions, in their order."""
    captions = held_out_captions()
    scenes = held_out_scenes(len(captions) * CAPTIONS_SHARE)[::CAPTIONS_SHARE]
    if [scene.caption for scene in scenes] != captions:
        raise RuntimeError("the embedded captions were made from other data")
    return scenes


def generate(
    pipe: StableDiffusionPipeline, captions: list[str], steps: int, guidance: float, batch_size: int = 10
) -> Tensor:
    """One picture a caption, each from its own seed: (captions, 3, height, width), uint8."""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for start in track(range(0, len(captions), batch_size), description="generating", transient=True):
        batch = captions[start : start + batch_size]
        generators = [torch.Generator().manual_seed(start + index) for index in range(len(batch))]
        pictures = pipe(batch, num_inference_steps=steps, guidance_scale=guidance, generator=generators,
                        output_type="pt").images  # fmt: skip
        parts.append(to_uint8(2 * pictures - 1))
    return torch.cat(parts)


def measure(name: str, images: Tensor, scenes: list[Scene], clip: ClipFeatures) -> dict[str, object]:
    """A row of the table: three accuracies, the CLIP score and the Fréchet distance to the reference pictures."""
    features = clip.of_images(images)
    colors, objects = zero_shot(clip, features, scenes)
    scores = clip_scores(features, clip.of_texts([scene.caption for scene in scenes]))
    distance = frechet_distance(Statistics.of(features), load_statistics(TINY_REFERENCE))
    return {
        "pictures": name,
        "count": len(images),
        "background colour": f"{share(colors, 1):.3f}",
        "object top-1": f"{share(objects, 1):.3f}",
        "object top-5": f"{share(objects, 5):.3f}",
        "CLIP score": f"{scores.mean().item():.1f}",
        "distance": f"{distance:.4f}",
    }


def zero_shot(clip: ClipFeatures, features: Tensor, scenes: list[Scene]) -> tuple[list[int], list[int]]:
    """The ranks (0 the best) that CLIP gives to the right colour among all, and to each right object among all.

    A candidate is the scene's caption with the one word replaced; a picture of two objects gives two ranks.
    """
    colors, objects = [], []
    for picture, scene in zip(features, scenes, strict=True):
        candidates = [replace(scene, color=name) for name in COLORS]
        colors.append(_rank(clip, picture, candidates, scene))
        for place in range(len(scene.objects)):
            before, after = scene.objects[:place], scene.objects[place + 1 :]
            candidates = [replace(scene, objects=(*before, name, *after)) for name in OBJECTS]
            objects.append(_rank(clip, picture, candidates, scene))
    return colors, objects


def share(ranks: list[int], top: int) -> float:
    """Share of ranks among the best few."""
    return sum(rank < top for rank in ranks) / len(ranks)


def blurred(images: Tensor, block: int) -> Tensor:
    """Average over blocks of pixels, enlarged again."""
    small = avg_pool2d(images.float(), block)
    return interpolate(small, scale_factor=block, mode="bilinear").round().byte()


def _rank(clip: ClipFeatures, picture: Tensor, candidates: list[Scene], right: Scene) -> int:
    similarity = clip.of_texts([scene.caption for scene in candidates]) @ picture
    return int((similarity > similarity[candidates.index(right)]).sum())


if __name__ == "__main__":
    main()
