"""Plot of a comparison: images, differences, merge maps, and the tokens removed at each step."""

import textwrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from tomesd_plus.evaluation.generation.compare import Comparison, Row
from tomesd_plus.evaluation.reporting.overlays import DIFFERENCE_GAIN, merge_map_overlay
from tomesd_plus.evaluation.reporting.overlays import difference as difference_of

MAX_PROMPTS = 8  # more rows are hard to read


def comparison_figure(comparison: Comparison) -> Figure:
    """Plot the baseline and each merging configuration with difference and merge map; below, tokens removed per step.

    Configurations without merge maps (fewer steps, another seed) show their images only. At most eight prompts are
    shown.
    """
    prompts = comparison.prompts[:MAX_PROMPTS]
    merging = [row for row in comparison.rows if any(m is not None for m in row.merge_maps)]
    others = [row for row in comparison.rows if row not in merging]
    columns = 1 + 3 * len(merging) + len(others)
    figure = Figure(figsize=(1.5 * columns + 0.6, 1.62 * len(prompts) + 2.4), layout="constrained")
    images, curve = np.ravel(np.asarray(figure.subfigures(2, 1, height_ratios=(1.62 * len(prompts), 2.2))))
    axes = images.subplots(len(prompts), columns, squeeze=False)
    for index, prompt in enumerate(prompts):
        base = comparison.baseline.generated[index].pixels
        cells = iter(axes[index])
        axis = next(cells)
        axis.imshow(_image(base))
        axis.set_ylabel(_wrapped(prompt), fontsize=6)
        _title(axis, index, f"{comparison.baseline.name}\n{comparison.baseline.seconds:.2f} s")
        for row in merging:
            image, difference, merge_map = next(cells), next(cells), next(cells)
            pixels = row.generated[index].pixels
            image.imshow(_image(pixels))
            _title(image, index, f"{row.name}\n{row.speedup:.2f}×")
            image.set_xlabel(f"{row.psnr[index]:.1f} dB", fontsize=6)
            difference.imshow(_image(difference_of(pixels, base)))
            _title(difference, index, f"difference\n× {DIFFERENCE_GAIN}")
            merge_map.imshow(_image(merge_map_overlay(pixels, row.merge_maps[index])))
            _title(merge_map, index, "tokens merged\nat the middle step")
        for row in others:
            axis = next(cells)
            axis.imshow(_image(row.generated[index].pixels))
            _title(axis, index, f"{row.name}\n{row.speedup:.2f}×")
            axis.set_xlabel(f"{row.psnr[index]:.1f} dB", fontsize=6)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    _draw_ratios(curve.subplots(), merging)
    return figure


def _draw_ratios(axis: Any, rows: list[Row]) -> None:
    for row in rows:
        for level in sorted(row.removed):
            shares = [record.removed.get(level, 0.0) for record in row.step_records]
            if any(shares):
                axis.step(range(1, len(shares) + 1), shares, where="mid", label=f"{row.name}, level {level}")
    axis.set(xlabel="step", ylim=(0, 1), title="share of tokens removed")
    axis.title.set_fontsize(8)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.tick_params(labelsize=7)
    if axis.lines:
        axis.legend(fontsize=7)


def _title(axis: Any, index: int, text: str) -> None:
    if index == 0:
        axis.set_title(text, fontsize=7)


def _image(pixels: Tensor) -> np.ndarray:
    return pixels.clamp(0, 1).permute(1, 2, 0).numpy()


def _wrapped(text: str, width: int = 20) -> str:
    return "\n".join(textwrap.wrap(text, width)[:4])
