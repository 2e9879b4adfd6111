"""Accuracy with merging on, and agreement with the untouched model.

On a folder of labelled pictures, one folder a label, with any image classifier that transformers loads:

    python -m examples.vision_accuracy --folder pictures --model google/vit-base-patch16-224

or, without a folder, the embedded CLIP on held-out scenes of emoji (fonts-noto-color-emoji).
"""

import argparse
import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from tomesd_plus import TowerReport, token_merging
from tomesd_plus.metrics import ClipFeatures
from tomesd_plus.tiny import TINY_CLIP

FIELDS = ("model", "questions", "method", "r", "patches removed", "top-1", "agreement")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
Predict = Callable[[], tuple[list[Any], list[Any]]]
"""Runs the model on all pictures: what it says of each, and what is right."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a folder with a folder of pictures for each label")
    parser.add_argument("--model", help="name or folder of an image classifier, for --folder")
    parser.add_argument("--scenes", type=int, default=400, help="how many scenes, without --folder")
    parser.add_argument("--r", type=int, nargs="+", default=[4, 8, 9, 12, 16], help="tokens to remove in each layer")
    parser.add_argument("--methods", nargs="+", default=["merging", "evit", "ats"])
    parser.add_argument("--out", type=Path, default=Path("vision-accuracy.csv"), help="the table to write")
    arguments = parser.parse_args()
    if (arguments.folder is None) != (arguments.model is None):
        parser.error("--folder and --model go together")
    if arguments.folder:
        model, predict = classifier(arguments.model, arguments.folder)
    else:
        model, predict = emoji_scenes(arguments.scenes)
    settings: list[dict[str, Any]] = [{}]
    settings += [{"method": method, "r": r} for method in arguments.methods for r in arguments.r]
    settings += [{"method": "merging", "r": r, "proportional_attention": False} for r in arguments.r]
    untouched: list[Any] = []
    with arguments.out.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        for setting in settings:
            with merging(model, setting) as report:
                predicted, right = predict()
            untouched = untouched or predicted
            plain = ", sizes ignored" if "proportional_attention" in setting else ""
            row = {
                "model": arguments.model or "embedded CLIP",
                "questions": len(right),
                "method": setting.get("method", "untouched") + plain,
                "r": setting.get("r", ""),
                "patches removed": f"{report.removed:.3f}" if report else "",
                "top-1": f"{share(predicted, right):.4f}",
                "agreement": f"{share(predicted, untouched):.4f}",
            }
            table.writerow(row)
            print(*row.values(), sep="\t")


@contextmanager
def merging(model: Any, setting: dict[str, Any]) -> Iterator[TowerReport | None]:
    """Merging on, or not."""
    with token_merging(model, **setting) if setting else nullcontext() as report:
        yield report


def share(ones: list[Any], others: list[Any]) -> float:
    """Share of those that are equal."""
    return sum(one == other for one, other in zip(ones, others, strict=True)) / len(ones)


def classifier(name: str, folder: Path) -> tuple[Any, Predict]:
    """A classifier and its run over a folder; a label counts as right if the folder's name is part of it."""
    from transformers import pipeline

    pipe = pipeline("image-classification", model=name)
    pictures = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES)
    if not pictures:
        raise SystemExit(f"{folder} has no folders with pictures ({', '.join(SUFFIXES)})")
    names = {path.parent.name for path in pictures}

    def predict() -> tuple[list[Any], list[Any]]:
        answers = pipe([Image.open(path).convert("RGB") for path in pictures], top_k=1, batch_size=8)
        said = [answer[0]["label"] for answer in answers]
        return [next((one for one in names if one.lower() in label.lower()), label) for label in said], [
            path.parent.name for path in pictures
        ]

    return pipe, predict


def emoji_scenes(count: int) -> tuple[Any, Predict]:
    """The embedded CLIP and its run over scenes: which of 50 objects does it see, asked for each object of a scene?"""
    from examples.train_tiny.data import OBJECTS, held_out_scenes, picture_batch

    clip = ClipFeatures.load(TINY_CLIP)
    scenes = held_out_scenes(count)
    pixels = ((picture_batch(scenes, 64, 7) + 1) * 127.5).round().byte()
    questions: list[tuple[int, Tensor, int]] = []  # picture, texts with each object in one's place, which is right
    for index, scene in enumerate(scenes):
        for place, right in enumerate(scene.objects):
            before, after = scene.objects[:place], scene.objects[place + 1 :]
            texts = [replace(scene, objects=(*before, name, *after)).caption for name in OBJECTS]
            questions.append((index, clip.of_texts(texts), list(OBJECTS).index(right)))

    def predict() -> tuple[list[Any], list[Any]]:
        features = clip.of_images(pixels)
        return [int((texts @ features[index]).argmax()) for index, texts, _ in questions], [q[2] for q in questions]

    return clip.model, predict


if __name__ == "__main__":
    main()
