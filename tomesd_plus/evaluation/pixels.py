"""Pixels of any picture that Pillow opens, as 8-bit RGB."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

# Formats that Pillow hands to other programs (EPS to Ghostscript), and those that are no pictures of pixels.
NOT_READ = {"EPS", "WMF", "PDF", "MPEG", "HDF5", "BUFR", "GRIB"}

BACKGROUND = (255, 255, 255, 255)  # transparent parts are seen on white, as on a page
LONGEST = 100  # sides in a relation above this would be resized to gigabytes by extractors

_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnusableImage(Exception):
    """A picture cannot be used; the message is a short reason, the same for all of its kind."""


def suffixes() -> dict[str, str]:
    """The suffixes of the formats that are read, with the formats; plugins that are registered with Pillow count."""
    Image.init()
    return {
        suffix: name
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in NOT_READ
    }


def open_file(path: Path) -> Image.Image:
    """Open a file whose content, whatever its name says, is of a format that is read."""
    return Image.open(path, formats=sorted(set(suffixes().values())))


def read_rgb(open_image: Callable[[], Image.Image]) -> Image.Image:
    """Read a picture as 8-bit RGB.

    Of an animation or a file of several pages the first frame is taken. A rotation in EXIF is applied. Transparent
    parts are set on white. 16-bit values are scaled by 65,535, or by the bits that a TIFF declares; floats and 32-bit
    integers only where a TIFF declares their range (SMinSampleValue and SMaxSampleValue), as any other range would be
    a guess. Lab is converted by its definition; colour profiles are not applied.

    Args:
        open_image: Opens it, without reading its pixels.

    Raises:
        UnusableImage: With the reason.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # of metadata; what concerns the pixels is raised
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow refuses twice that size
        try:
            with open_image() as image:
                _check_sides(*image.size)
                image.load()
                rotation, rgb = _rotation(image), to_rgb(image)
                return rgb if rotation is None else rgb.transpose(rotation)
        except UnusableImage:
            raise
        except Image.DecompressionBombError as error:
            raise UnusableImage("more pixels than Pillow's limit") from error
        except UnidentifiedImageError as error:
            raise UnusableImage("no picture in a format that is read") from error
        except FileNotFoundError as error:
            raise UnusableImage("not there any more") from error
        except PermissionError as error:
            raise UnusableImage("no permission to read it") from error
        except MemoryError as error:
            raise UnusableImage("too large for the memory") from error
        except Exception as error:  # each format raises its own errors
            raise UnusableImage("damaged, truncated or not decoded by Pillow") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded picture of any mode to RGB; see :func:`read_rgb`."""
    if image.mode.startswith("I;16"):
        return _scaled(image, _top_of_16_bits(image))
    if image.mode in ("I", "F"):
        return _scaled_as_declared(image)
    if image.mode == "LAB":
        to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, to_srgb)
        assert converted is not None  # it is only in place
        return converted
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "PA", "RGBA") or image.info.get("transparency") is not None:
        key = image.info.get("transparency")
        if isinstance(key, tuple) and max(key) > 255:  # of 16-bit colours, whose upper bytes Pillow has read
            image.info["transparency"] = tuple(value >> 8 for value in key)
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, BACKGROUND), seen).convert("RGB")
    return image.convert("RGB")


def _rotation(image: Image.Image) -> Image.Transpose | None:
    if image.format == "TIFF":  # Pillow has turned it while reading, and older ones still tell of the rotation
        return None
    try:
        return _TRANSPOSED.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF says nothing of a rotation, and the pixels are as good as before
        return None


def _check_sides(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise UnusableImage("no pixels")
    if max(width, height) > LONGEST * min(width, height):
        raise UnusableImage(f"one side more than {LONGEST} times the other")


def _top_of_16_bits(image: Image.Image) -> int:
    """The value of white: TIFF keeps 12 bits in 16 as they are, other formats are scaled when Pillow reads them."""
    bits = _tiff_tag(image, 258) or (16,)
    return int(2 ** bits[0] - 1)


def _scaled_as_declared(image: Image.Image) -> Image.Image:
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits: of these, older Pillows make 32
        return _scaled(image, 65535)
    low, high = _tiff_tag(image, 340), _tiff_tag(image, 341)
    if not low or not high or not -np.inf < low[0] < high[0] < np.inf:
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise UnusableImage(f"{kind} of no declared range")
    return _scaled(image, high[0], low[0])


def _scaled(image: Image.Image, high: float, low: float = 0) -> Image.Image:
    """Grey values between low and high as 8 bits."""
    values = np.asarray(image)
    key = image.info.get("transparency")  # of a PNG: the one value that is transparent
    transparent = values == key if isinstance(key, int) else np.zeros(values.shape, dtype=bool)
    grey = (values.astype(np.float64) - low) / (high - low)
    if not np.isfinite(grey).all():
        raise UnusableImage("NaN or infinity among its values")
    if _tiff_tag(image, 262) == 0:  # white is zero; of 16 bits and floats Pillow does not turn it over
        grey = 1 - grey
    grey[transparent] = 1
    return Image.fromarray(np.rint(255 * grey.clip(0, 1)).astype(np.uint8)).convert("RGB")


def _tiff_tag(image: Image.Image, tag: int) -> Any:
    return getattr(image, "tag_v2", {}).get(tag)
