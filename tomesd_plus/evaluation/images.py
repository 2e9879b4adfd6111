"""Read images from files, folders and data sets."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.folders import list_pictures
from tomesd_plus.evaluation.hub_data import choose_column, load_data_set
from tomesd_plus.evaluation.pixels import UnusableImage, open_file, read_rgb
from tomesd_plus.evaluation.words import in_words, printable

BATCH_BYTES = 2**28  # large pictures come in smaller batches


def to_image(pixels: Tensor) -> Image.Image:
    """Convert pixels (3, height, width) in [0, 1] to 8 bits, rounded as in diffusers."""
    return Image.fromarray(pixels.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


@dataclass
class Images:
    """A sequence of images that are read on access, so that memory does not grow with their number.

    Args:
        names: Name of each image.
        open: Opens the image with a given index.
        unreadable: The images that could not be read so far, by name, with the reason.
        passed_over: Number of files that were not even tried, by reason.
    """

    names: Sequence[str]
    open: Callable[[int], Image.Image]
    unreadable: dict[str, str] = field(default_factory=dict)
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of_paths(cls, paths: Sequence[Path]) -> "Images":
        """The images in these files."""
        return cls([str(path) for path in paths], lambda index: open_file(paths[index]))

    @classmethod
    def of_folder(cls, folder: Path) -> "Images":
        """The images in a folder and its subfolders, sorted by path; see :func:`~.folders.list_pictures`."""
        listing = list_pictures(folder)
        if not listing.paths:
            others = f" Skipped: {in_words(listing.skipped)}." if listing.skipped else ""
            raise EvaluationError(
                f"{printable(folder)} holds no images (.png, .jpg, .webp, .tif or another suffix that Pillow knows)."
                f"{others}"
            )
        images = cls.of_paths(listing.paths)
        images.passed_over = listing.skipped
        return images

    @classmethod
    def of_data_set(cls, name: str, split: str = "validation", column: str | None = None) -> "Images":
        """The images of a data set; needs the library datasets."""
        data = load_data_set(name, split, "images")
        chosen = choose_column(data.column_names, column, name, ("image", "jpg", "img"))
        return cls([f"{name}[{index}]" for index in range(len(data))], lambda index: data[index][chosen])

    @property
    def skipped(self) -> dict[str, int]:
        """How many files were left out so far, by reason: those that could not be read, and those not even tried."""
        return dict(Counter(self.unreadable.values()) + Counter(self.passed_over))

    def read(self, index: int) -> Tensor | None:
        """Read an image as uint8 (3, height, width); ``None``, and an entry in :attr:`unreadable`, if that fails."""
        try:
            image = read_rgb(lambda: self.open(index))
        except UnusableImage as error:
            self.unreadable[self.names[index]] = str(error)
            return None
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def batches(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield indices and uint8 images (count, 3, height, width); a change of size starts a new batch."""
        indices: list[int] = []
        images: list[Tensor] = []
        for index in range(len(self)):
            image = self.read(index)
            if image is None:
                continue
            full = len(images) == size or len(images) * image.numel() >= BATCH_BYTES
            if images and (full or image.shape != images[0].shape):
                yield indices, torch.stack(images)
                indices, images = [], []
            indices.append(index)
            images.append(image)
        if images:
            yield indices, torch.stack(images)
