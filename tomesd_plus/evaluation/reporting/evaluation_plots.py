"""Plots of an evaluation: speed against quality, a grid of images, and the tokens removed at each step."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.experiment import Experiment
from tomesd_plus.evaluation.file_io import atomic_write
from tomesd_plus.evaluation.images import Images
from tomesd_plus.evaluation.scoring.results import Result

GRID_ROWS, GRID_COLUMNS = 8, 12  # more are hard to read
MAX_NAMES = 12  # with more points, only those on the Pareto front are labelled
HIGHER_IS_BETTER = ("PSNR", "SSIM", "CLIP score")


@dataclass(frozen=True)
class Point:
    """A row's speed-up and quality: the metric's value, or its negative if lower is better."""

    name: str
    speedup: float
    quality: float


def save_plots(rows: Sequence[Result], out: Path) -> list[Path]:
    """Write ``pareto.png``, ``grid.png`` and ``ratios.png``, each if there is data for it; returns their paths."""
    figures = {"pareto": pareto_figure(rows), "grid": grid_figure(rows), "ratios": ratio_figure(rows)}
    paths = []
    for name, figure in figures.items():
        path = out / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # from an earlier report
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        atomic_write(path, buffer.getvalue())
        paths.append(path)
    return paths


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both speed-up and quality, from slow to fast.

    Example:
        >>> slow, fast, worse = Point("a", 1.0, 40.0), Point("b", 1.5, 30.0), Point("c", 1.4, 29.0)
        >>> [point.name for point in pareto_front([fast, worse, slow])]
        ['a', 'b']
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.speedup, -point.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return front[::-1]


def pareto_figure(rows: Sequence[Result]) -> Figure | None:
    """Plot PSNR, the first distance and the first CLIP score, where available, against speed-up.

    Up is better. The noise floor, whose time is the baseline's, is a horizontal line.
    """
    timed = [row for row in rows if row.speed]
    metrics = list(dict.fromkeys(name for row in timed for name in row.metrics))
    distance = [name for name in metrics if not name.startswith((*HIGHER_IS_BETTER, "LPIPS"))]
    chosen = [name for name in metrics if name.startswith("PSNR")] + distance[:1]
    chosen += [name for name in metrics if name.startswith("CLIP score")][:1]
    if not chosen:
        return None
    figure = Figure(figsize=(5.5 * len(chosen), 4), layout="constrained")
    for axis, metric in zip(np.ravel(figure.subplots(1, len(chosen))), chosen, strict=True):
        sign = 1 if metric.startswith(HIGHER_IS_BETTER) else -1
        points = []
        for row in timed:
            if row.speed is None or metric not in row.metrics:
                continue
            estimate = row.metrics[metric]
            if row.manifest["configuration"]["seed_offset"]:
                axis.axhline(estimate.value, color="0.6", linestyle=":", linewidth=0.8, zorder=0, label=row.name)
                continue
            points.append(Point(row.name, row.speed.speedup, sign * estimate.value))
            bars = None if estimate.low is None else (estimate.high or 0) - estimate.value
            axis.errorbar(row.speed.speedup, estimate.value, bars, fmt="o", markersize=4, linewidth=0.8)
        front = pareto_front(points)
        for point in points if len(points) <= MAX_NAMES else front:
            axis.annotate(point.name, (point.speedup, sign * point.quality), fontsize=6, xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
        axis.plot([p.speedup for p in front], [sign * p.quality for p in front], "k--", linewidth=0.8, zorder=0,
                  label="Pareto front")  # fmt: skip
        axis.set(xlabel="speed-up", ylabel=metric)
        if sign < 0:
            axis.invert_yaxis()  # up is better
        axis.legend(fontsize=7)
    return figure


def grid_figure(rows: Sequence[Result]) -> Figure | None:
    """Plot the first images of the first configurations: a row per item, a column per configuration."""
    rows = rows[:GRID_COLUMNS]
    names = [{path.name for path in row.images_at.glob("*.png")} for row in rows]
    shared = sorted(set.intersection(*names))[:GRID_ROWS] if names else []
    if not shared:
        return None
    prompts = _prompts(rows[0])
    figure = Figure(figsize=(1.5 * len(rows) + 0.4, 1.62 * len(shared) + 0.4), layout="constrained")
    axes = figure.subplots(len(shared), len(rows), squeeze=False)
    for column, row in enumerate(rows):
        images = Images.of_paths([row.images_at / name for name in shared])
        axes[0, column].set_title("\n".join(textwrap.wrap(row.name, 22)), fontsize=7)
        for index, name in enumerate(shared):
            axis, pixels = axes[index, column], images.read(index)
            axis.set(xticks=[], yticks=[])
            if pixels is not None:
                axis.imshow(pixels.permute(1, 2, 0).numpy())
            if column == 0:
                axis.set_ylabel("\n".join(textwrap.wrap(prompts.get(name, ""), 20)[:4]), fontsize=6)
    return figure


def ratio_figure(rows: Sequence[Result]) -> Figure | None:
    """Plot the share of tokens removed at each step, by configuration and downsample."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        steps = row.speed.removed if row.speed else []
        for level in sorted({level for step in steps for level, share in step["removed"].items() if share}, key=int):
            shares = [step["removed"].get(level, 0.0) for step in steps]
            axis.step(range(1, len(shares) + 1), shares, where="mid", label=f"{row.name}, downsample {level}")
    if not axis.lines:
        return None
    axis.set(xlabel="step", ylabel="share of tokens removed", ylim=(0, 1))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.legend(fontsize=6)
    return figure


def _prompts(row: Result) -> dict[str, str]:
    """Prompts by file name, if the experiment's index is available."""
    try:
        experiment = Experiment.load(row.images_at.parent)
    except EvaluationError:
        return {}
    return {f"{item.name}.png": item.prompt for item in experiment.items}
