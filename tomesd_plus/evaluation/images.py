"""Read images in batches, whatever there is on the disk."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.hub_data import choose_column, load_data_set

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def to_image(pixels: Tensor) -> Image.Image:
    """A picture (3, height, width) in [0, 1], rounded to 8 bits as diffusers does."""
    return Image.fromarray(pixels.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


@dataclass
class Images:
    """Images that are read when they are asked for, so that memory does not grow with their number.

    Args:
        names: Of each.
        open: From an index to the opened image.
        unreadable: Names of those that could not be read so far.
    """

    names: Sequence[str]
    open: Callable[[int], Image.Image]
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of_paths(cls, paths: Sequence[Path]) -> "Images":
        """Of files."""
        return cls([str(path) for path in paths], lambda index: Image.open(paths[index]))

    @classmethod
    def of_folder(cls, folder: Path) -> "Images":
        """Of a folder and those below it, in the order of their names."""
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise EvaluationError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
        return cls.of_paths(paths)

    @classmethod
    def of_data_set(cls, name: str, split: str = "validation", column: str | None = None) -> "Images":
        """Of a data set by its id; needs the library datasets."""
        data = load_data_set(name, split, "images")
        chosen = choose_column(data.column_names, column, name, ("image", "jpg", "img"))
        return cls([f"{name}[{index}]" for index in range(len(data))], lambda index: data[index][chosen])

    def read(self, index: int) -> Tensor | None:
        """An image as (3, height, width), uint8; ``None`` if it cannot be read, and :attr:`unreadable` gets it."""
        try:
            with self.open(index) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except Exception:  # truncated, no image at all, too large, gone: each format has its own errors
            self.unreadable.append(self.names[index])
            return None

    def batches(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Indices and images, (count, 3, height, width), uint8; where the size changes, a new batch begins."""
        indices: list[int] = []
        images: list[Tensor] = []
        for index in range(len(self)):
            image = self.read(index)
            if image is None:
                continue
            if images and (len(images) == size or image.shape != images[0].shape):
                yield indices, torch.stack(images)
                indices, images = [], []
            indices.append(index)
            images.append(image)
        if images:
            yield indices, torch.stack(images)
