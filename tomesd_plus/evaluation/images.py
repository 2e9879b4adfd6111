"""Read images from files, folders and data sets."""

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
    """Convert pixels (3, height, width) in [0, 1] to 8 bits, rounded as in diffusers."""
    return Image.fromarray(pixels.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


@dataclass
class Images:
    """A sequence of images that are read on access, so that memory does not grow with their number.

    Args:
        names: Name of each image.
        open: Opens the image with a given index.
        unreadable: Names of the images that could not be read so far.
    """

    names: Sequence[str]
    open: Callable[[int], Image.Image]
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of_paths(cls, paths: Sequence[Path]) -> "Images":
        """The images in these files."""
        return cls([str(path) for path in paths], lambda index: Image.open(paths[index]))

    @classmethod
    def of_folder(cls, folder: Path) -> "Images":
        """The images in a folder and its subfolders, sorted by path."""
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise EvaluationError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
        return cls.of_paths(paths)

    @classmethod
    def of_data_set(cls, name: str, split: str = "validation", column: str | None = None) -> "Images":
        """The images of a data set; needs the library datasets."""
        data = load_data_set(name, split, "images")
        chosen = choose_column(data.column_names, column, name, ("image", "jpg", "img"))
        return cls([f"{name}[{index}]" for index in range(len(data))], lambda index: data[index][chosen])

    def read(self, index: int) -> Tensor | None:
        """Read an image as uint8 (3, height, width); ``None``, and an entry in :attr:`unreadable`, if that fails."""
        try:
            with self.open(index) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except Exception:  # truncated, not an image, too large, deleted: each format raises its own errors
            self.unreadable.append(self.names[index])
            return None

    def batches(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield indices and uint8 images (count, 3, height, width); a change of size starts a new batch."""
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
