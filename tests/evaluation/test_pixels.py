"""Every mode and format that Pillow opens gives the right pixels, or is counted with a reason."""

import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from tomesd_plus.evaluation.images import Images
from tomesd_plus.evaluation.pixels import NOT_READ, suffixes


def read(path):
    """Pixels (height, width, 3), or the reason why there are none."""
    images = Images.of_paths([path])
    pixels = images.read(0)
    return images.unreadable[str(path)] if pixels is None else pixels.permute(1, 2, 0).numpy()


def gradient(width=80, height=48):
    """Smooth colours, so that lossy formats keep them."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], -1)).round().astype(np.uint8))


GREY_16 = np.linspace(0, 65535, 240).reshape(12, 20).round().astype(np.uint16)
EXPECTED_16 = np.rint(GREY_16 / 257).astype(int)

LOSSLESS = ("png", "bmp", "dib", "tiff", "ppm", "tga", "sgi", "im", "pcx", "jp2", "qoi", "apng", "ras", "icns", "dds")
LOSSY = {"jpg": 12, "jpeg": 12, "jfif": 12, "webp": 12, "gif": 40, "avif": 12}
WRITERS = {"ras": None, "icns": None, "dds": "DDS"}


@pytest.mark.parametrize("suffix", [*(s for s in LOSSLESS if WRITERS.get(s, s) is not None), *LOSSY])
def test_formats(tmp_path, suffix):
    image = gradient()
    path = tmp_path / f"a.{suffix}"
    if f".{suffix}" not in suffixes():
        pytest.skip(f"this Pillow reads no {suffix}")
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    try:
        image.save(path, "PNG" if suffix == "apng" else None)
    except (KeyError, ValueError, OSError):
        pytest.skip(f"this Pillow writes no {suffix}")
    pixels = read(path)
    assert not isinstance(pixels, str), pixels
    assert np.abs(pixels.astype(int) - np.asarray(image)).max() <= LOSSY.get(suffix, 0)


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("1", "png", 0), ("1", "tiff", 0), ("1", "pbm", 0), ("L", "png", 0), ("L", "pgm", 0), ("L", "jpg", 6),
        ("LA", "png", 0), ("LA", "tiff", 0), ("P", "png", 0), ("P", "gif", 0), ("P", "tiff", 0), ("PA", "tiff", 0),
        ("RGBA", "png", 0), ("RGBA", "tiff", 0), ("RGBA", "webp", 12), ("RGBX", "tiff", 0), ("CMYK", "jpg", 10),
        ("CMYK", "tiff", 0), ("YCbCr", "jpg", 12),
    ],
)  # fmt: skip
def test_modes(tmp_path, mode, suffix, tolerance):
    image = gradient().convert("L").convert("LA").convert("PA") if mode == "PA" else gradient().convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    pixels = read(tmp_path / f"a.{suffix}")
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert not isinstance(pixels, str), pixels
    assert np.abs(pixels - expected).max() <= tolerance


def test_what_pillow_cannot_decode_is_told(tmp_path):
    gradient().convert("YCbCr").save(tmp_path / "a.tiff")  # Pillow writes these, and cannot read them
    assert read(tmp_path / "a.tiff") == "damaged, truncated or not decoded by Pillow"


def of_memory(image):
    """As data sets give them: modes that no file has, too."""
    images = Images(["it"], lambda index: image)
    pixels = images.read(0)
    return images.unreadable["it"] if pixels is None else pixels.permute(1, 2, 0).numpy()


def test_modes_without_a_file():
    colours = gradient()
    assert np.abs(of_memory(colours.convert("HSV")).astype(int) - np.asarray(colours)).max() <= 8
    half = Image.merge("RGBA", [*colours.split(), Image.new("L", colours.size, 128)])
    straight = of_memory(half).astype(int)
    assert np.abs(of_memory(half.convert("RGBa")).astype(int) - straight).max() <= 3
    grey = half.convert("LA")
    assert np.abs(of_memory(grey.convert("La")).astype(int) - of_memory(grey)).max() <= 3


def test_lab_is_converted_by_its_definition(tmp_path):
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(gradient(), srgb, lab, outputMode="LAB")
    image.save(tmp_path / "a.tiff")
    assert np.abs(read(tmp_path / "a.tiff").astype(int) - np.asarray(gradient())).mean() < 2  # 8 bits of Lab


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm", "jp2"])
def test_16_bits_are_scaled(tmp_path, suffix):
    if suffix == "pgm":  # older Pillows read these, and do not write them
        (tmp_path / "a.pgm").write_bytes(b"P5 20 12 65535\n" + GREY_16.astype(">u2").tobytes())
    else:
        Image.fromarray(GREY_16).save(tmp_path / f"a.{suffix}")
    pixels = read(tmp_path / f"a.{suffix}").astype(int)
    assert np.abs(pixels - EXPECTED_16[..., None]).max() <= 1


def test_a_dark_16_bit_picture_is_not_white(tmp_path):
    """The case that was reported: a mean of 126 was read as 254."""
    Image.fromarray(np.full((8, 8), 126 * 257, dtype=np.uint16)).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == 126).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bits_of_every_byte_order(mode):
    little = mode in ("I;16", "I;16L") or (mode == "I;16N" and sys.byteorder == "little")
    data = GREY_16.astype("<u2" if little else ">u2").tobytes()
    try:
        image = Image.frombytes(mode, (20, 12), data)
    except ValueError:
        pytest.skip(f"this Pillow has no {mode}")
    assert np.abs(of_memory(image).astype(int) - EXPECTED_16[..., None]).max() <= 1


def tiff(path, values, tags, order="<"):
    """A minimal TIFF by hand: what Pillow does not write."""
    raw = values.tobytes()
    entries = {256: (4, values.shape[1]), 257: (4, values.shape[0]), 259: (3, 1), 273: (4, 8),
               278: (4, values.shape[0]), 279: (4, len(raw)), 277: (3, 1), 262: (3, 1), **tags}  # fmt: skip
    start = 8 + len(raw)
    directory = struct.pack(f"{order}H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        layout = {3: "Hxx", 4: "I", 11: "f"}[kind]
        directory += struct.pack(f"{order}HHI{layout}", tag, kind, 1, value)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(magic + struct.pack(f"{order}I", start) + raw + directory + b"\0\0\0\0")


def test_tiffs_declare_bits_and_ranges(tmp_path):
    path = tmp_path / "a.tif"
    tiff(path, GREY_16.astype(">u2"), {258: (3, 16)}, ">")
    assert np.abs(read(path) - EXPECTED_16[..., None]).max() <= 1
    tiff(path, GREY_16, {258: (3, 16), 262: (3, 0)})  # white is zero
    assert np.abs(read(path) - (255 - EXPECTED_16[..., None])).max() <= 1
    values = np.linspace(-2, 6, 240, dtype=np.float32).reshape(12, 20)
    tiff(path, values, {258: (3, 32), 339: (3, 3)})
    assert read(path) == "floats of no declared range"
    tiff(path, values, {258: (3, 32), 339: (3, 3), 340: (11, -2.0), 341: (11, 6.0)})
    assert np.abs(read(path)[..., 0] - (values + 2) / 8 * 255).max() <= 0.51
    values[0, 0] = np.nan
    tiff(path, values, {258: (3, 32), 339: (3, 3), 340: (11, -2.0), 341: (11, 6.0)})
    assert read(path) == "NaN or infinity among its values"
    tiff(path, values, {258: (3, 32), 339: (3, 3), 340: (11, 2.0), 341: (11, 2.0)})
    assert read(path) == "floats of no declared range"
    tiff(path, GREY_16.astype(np.uint32), {258: (3, 32)})
    assert read(path) == "32-bit integers of no declared range"
    tiff(path, GREY_16.astype(np.int16), {258: (3, 16), 339: (3, 2)})
    assert read(path) == "32-bit integers of no declared range"
    packed = np.zeros((12, 30), dtype=np.uint8)  # 20 values of 12 bits
    twelve = (GREY_16 >> 4).astype(int)
    packed[:, 0::3], packed[:, 2::3] = twelve[:, 0::2] >> 4, twelve[:, 1::2] & 255
    packed[:, 1::3] = (twelve[:, 0::2] & 15) << 4 | twelve[:, 1::2] >> 8
    tiff(path, packed, {258: (3, 12), 256: (4, 20)})
    assert np.abs(read(path)[..., 0] - twelve / 4095 * 255).max() <= 0.51


def test_floats_and_integers_of_other_formats_are_left_out_with_the_reason(tmp_path):
    Image.fromarray(np.random.rand(8, 8).astype(np.float32)).save(tmp_path / "a.tiff")
    assert read(tmp_path / "a.tiff") == "floats of no declared range"
    assert of_memory(Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8))).startswith("32-bit integers")
    (tmp_path / "a.pfm").write_bytes(b"Pf\n2 2\n-1.0\n" + np.ones(4, dtype="<f4").tobytes())
    assert read(tmp_path / "a.pfm") in ("floats of no declared range", "no picture in a format that is read")


def png(path, colour_type, depth, rows, transparency=b""):
    """A PNG by hand: of 16 bits a channel, and with one transparent colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = chunk(b"IHDR", header) + (chunk(b"tRNS", transparency) if transparency else b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_16_bits_a_channel(tmp_path):
    colours = np.stack([GREY_16, GREY_16[::-1], GREY_16[:, ::-1]], -1)
    png(tmp_path / "rgb.png", 2, 16, colours.astype(">u2"))
    assert np.abs(read(tmp_path / "rgb.png") - colours / 257).max() <= 1
    alpha = np.full_like(GREY_16, 32768)
    png(tmp_path / "rgba.png", 6, 16, np.concatenate([colours, alpha[..., None]], -1).astype(">u2"))
    assert np.abs(read(tmp_path / "rgba.png") - (colours / 257 / 2 + 127.5)).max() <= 2
    png(tmp_path / "la.png", 4, 16, np.stack([GREY_16, alpha], -1).astype(">u2"))
    assert np.abs(read(tmp_path / "la.png") - (GREY_16[..., None] / 257 / 2 + 127.5)).max() <= 2


def test_transparent_parts_are_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.paste((0, 200, 0, 0), (0, 0, 4, 8))
    expected = np.full((8, 8, 3), 255)
    expected[:, 4:] = (200, 0, 0)
    for suffix in ("png", "tiff"):
        image.save(tmp_path / f"a.{suffix}")
        assert (read(tmp_path / f"a.{suffix}") == expected).all()
    image.putalpha(Image.new("L", (8, 8), 128))
    image.save(tmp_path / "half.png")
    assert np.abs(read(tmp_path / "half.png")[0, 7].astype(int) - (227, 127, 127)).max() <= 1


def test_one_transparent_colour_is_white(tmp_path):
    grey = np.tile(np.array([[10, 200]], dtype=np.uint8), (8, 4))
    colours = np.stack([grey] * 3, -1)
    for depth, kind in ((8, "u1"), (16, ">u2")):
        scale = 1 if depth == 8 else 257
        png(tmp_path / "l.png", 0, depth, (grey.astype(int) * scale).astype(kind), struct.pack(">H", 10 * scale))
        assert (read(tmp_path / "l.png")[0, :2] == [[255] * 3, [200] * 3]).all()
        key = struct.pack(">HHH", *[10 * scale] * 3)
        png(tmp_path / "rgb.png", 2, depth, (colours.astype(int) * scale).astype(kind), key)
        assert (read(tmp_path / "rgb.png")[0, :2] == [[255] * 3, [200] * 3]).all()
    palette = Image.fromarray(np.tile(np.array([[0, 1]], dtype=np.uint8), (8, 4)), "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    for transparency in (0, b"\0\xff"):
        palette.save(tmp_path / "p.png", transparency=transparency)
        assert (read(tmp_path / "p.png")[0, :2] == [[255] * 3, [200, 100, 50]]).all()
    palette.save(tmp_path / "p.gif", transparency=0)
    assert (read(tmp_path / "p.gif")[0, :2] == [[255] * 3, [200, 100, 50]]).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_in_exif_is_applied(tmp_path, suffix, orientation):
    upright = Image.fromarray(np.repeat(np.repeat(np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250] * 3]],
                                                           dtype=np.uint8), 16, 0), 32, 1))  # fmt: skip
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's number of the inverse transposition
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undone[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if suffix in ("jpg", "webp") else {}
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    pixels = read(tmp_path / f"a.{suffix}")
    assert pixels.shape == (32, 64, 3)
    middles = pixels[8::16, 16::32].astype(int)
    assert np.abs(middles - np.asarray(upright)[8::16, 16::32].astype(int)).max() < 30


def test_nonsense_in_exif_does_no_harm(tmp_path):
    gradient().save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 77
    gradient().save(tmp_path / "b.png", exif=exif)
    gradient().save(tmp_path / "c.png", exif=b"Exif\0\0garbage")
    assert all((read(tmp_path / f"{name}.png") == np.asarray(gradient())).all() for name in "abc")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_several_frames_the_first_is_taken(tmp_path, suffix):
    first, second = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], **options)
    assert (read(tmp_path / f"a.{suffix}") == (200, 0, 0)).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp", "gif", "ppm", "tga", "jp2", "avif", "sgi"])
def test_truncated_files_are_told(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    try:
        noise.save(path)
    except (KeyError, ValueError, OSError):
        pytest.skip(f"this Pillow writes no {suffix}")
    whole = path.read_bytes()
    for part in (0.9, 0.5, 0.1):
        path.write_bytes(whole[: int(part * len(whole))])
        assert read(path) in ("damaged, truncated or not decoded by Pillow", "no picture in a format that is read"), (
            part
        )
    path.write_bytes(b"")
    assert read(path) == "no picture in a format that is read"


def test_bombs_are_left_out(tmp_path, monkeypatch):
    header = struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4))
    assert read(tmp_path / "a.png") == "more pixels than Pillow's limit"
    Image.new("RGB", (5000, 2)).save(tmp_path / "long.png")
    assert read(tmp_path / "long.png") == "one side more than 100 times the other"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    gradient(15, 15).save(tmp_path / "large.png")  # below twice the limit: Pillow only warns
    assert (read(tmp_path / "large.png") == np.asarray(gradient(15, 15))).all()


def test_what_other_programs_would_draw_is_not_opened(tmp_path):
    assert not {suffixes().get(suffix) for suffix in (".eps", ".ps", ".wmf", ".pdf", ".h5")} - {None}
    assert not set(suffixes().values()) & NOT_READ
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n%%EOF\n")
    assert read(tmp_path / "a.png") == "no picture in a format that is read"


def test_what_is_no_image_is_told(tmp_path):
    assert of_memory(None) == "damaged, truncated or not decoded by Pillow"
    assert read(tmp_path / "none.png") == "not there any more"
