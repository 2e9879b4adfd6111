"""Run the short examples, and lay what each draws side by side: ``docs/pictures/example-*.png``; two minutes.

And ``docs/compare.png``, by ``tomesd-plus compare``.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).parents[1]
SHORT = {
    "quickstart": ["quickstart"],
    "with_feature_cache": ["untouched", "cache-and-merging", "quality", "balanced", "fast"],
    "tune": ["untouched", "tuned"],
    "from_tomesd": ["tomesd", "tomesd_plus"],
    "vision": ["vision"],
    "plot_schedules": ["schedules"],
}
"""Examples, and the pictures they write."""


def sheet(pictures: dict[str, Image.Image], path: Path) -> None:
    """Pictures in a row with their names; one alone as it is."""
    height = max(picture.height for picture in pictures.values())
    widths = [picture.width * height / picture.height for picture in pictures.values()]
    side = 1.5 if len(pictures) > 1 or height < 300 else 3.0
    figure = Figure(figsize=(side * sum(widths) / height, side + 0.25), layout="constrained")
    axes = figure.subplots(1, len(pictures), width_ratios=widths, squeeze=False)[0]
    for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture, interpolation="nearest" if picture.width < 300 else "antialiased")
        axis.set(xticks=[], yticks=[])
        if len(pictures) > 1:
            axis.set_title(f"{name}.png", fontsize=8)
        for edge in axis.spines.values():
            edge.set_visible(False)
    figure.savefig(path, dpi=110)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main() -> None:
    """Draw them all."""
    for example, names in SHORT.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
            pictures = {name: Image.open(f"{name}.png").convert("RGB") for name in names}
            sheet(pictures, ROOT / "docs" / "pictures" / f"example-{example.replace('_', '-')}.png")
            os.chdir(ROOT)
    path = ROOT / "docs" / "compare.png"
    subprocess.run([sys.executable, "-m", "tomesd_plus", "compare", "--no-peers", "--out", path], check=True)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
