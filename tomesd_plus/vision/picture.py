"""A picture of which patches went together."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEAST = 8  # pixels a patch
OUTLINE = (255, 255, 255)


def draw_groups(groups: NDArray[np.int64], picture: Any) -> Image.Image:
    """Fill each group of patches with its mean colour, and outline it.

    Args:
        groups: The number of each patch's group, (rows, columns).
        picture: A PIL picture, or an array or tensor (3, height, width) or (height, width, 3) in any range.
    """
    image = _as_image(picture)
    rows, columns = groups.shape
    side = max(LEAST, round(min(image.width / columns, image.height / rows)))
    pixels = np.asarray(image.resize((columns * side, rows * side), Image.Resampling.LANCZOS), dtype=np.float64)
    of_pixel = groups.repeat(side, axis=0).repeat(side, axis=1)
    _, number = np.unique(of_pixel, return_inverse=True)
    number = number.ravel()
    counts = np.bincount(number)
    means = np.stack([np.bincount(number, pixels[..., c].ravel()) / counts for c in range(3)], axis=1)
    drawn = means[number].reshape(pixels.shape).round().astype(np.uint8)
    edge = np.zeros(of_pixel.shape, dtype=bool)
    edge[1:] |= of_pixel[1:] != of_pixel[:-1]
    edge[:, 1:] |= of_pixel[:, 1:] != of_pixel[:, :-1]
    drawn[edge] = OUTLINE
    return Image.fromarray(drawn)


def _as_image(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    array = np.asarray(picture.detach().cpu().float() if hasattr(picture, "detach") else picture)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture is a PIL image or (3, height, width), not of shape {array.shape}")
    if array.dtype != np.uint8:  # normalized pixel values have a range of their own
        low, high = array.min(), array.max()
        low, high = (0, 1) if low >= 0 and high <= 1 else (0, 255) if low >= 0 and high <= 255 else (low, high)
        array = ((array - low) / (high - low) * 255).round().astype(np.uint8)
    return Image.fromarray(array)
