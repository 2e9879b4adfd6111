"""Markdown tables of the benchmark's rows, and a plot of speed-up over image size."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from tomesd_plus.benchmark.rows import Row
from tomesd_plus.benchmark.settings import IDEAL, UNTOUCHED
from tomesd_plus.evaluation.file_io import atomic_write

LEGEND = """\
Weights are random: the cost depends on shapes, not on weights. The batch size includes both guidance branches. Times
are medians of runs interleaved with the untouched UNet (PyTorch's scaled-dot-product attention), brackets their
minimum and maximum; a speed-up is the median over pairs of runs. In one thread of a CPU they are the time that
the thread has run. *Efficiency* is the share of the *ideal* row's saving that is reached; there the same layers run on
as few tokens without overhead. Matching and merging are measured
separately, in eager mode. *PSNR* is the setting's on the embedded 64 × 64 pipeline, against the untouched images of
the same seeds: a tiny model, for comparing settings only, whatever the size of the row."""
TOWER_LEGEND = """\
Weights are random: the cost depends on shapes, not on weights. Times are medians of runs interleaved with the
untouched tower (PyTorch's scaled-dot-product attention), brackets their minimum and maximum; a speed-up is the median
over pairs of runs. In one thread of a CPU they are the time that the thread has run. r is the number of tokens that
each layer removes, or that with an inflection. *Efficiency* is the share of the *ideal* row's saving that is reached;
there as many tokens are cut off, and nothing is matched or averaged."""
HEADER = ("setting", "ratio", "levels", "ms / UNet step", "speed-up", "efficiency", "matching ms", "merging ms",
          "peak MiB", "PSNR dB", "note")  # fmt: skip
TOWER_HEADER = ("method", "r", "images / s", "ms / call", "speed-up", "efficiency", "matching ms", "merging ms",
                "peak MiB", "note")  # fmt: skip
MAX_LINES = 20  # per plot


def save_report(rows: Sequence[Row], folder: Path, name: str) -> list[Path]:
    """Write ``NAME.md``, and ``NAME.png`` if there are speed-ups; return their paths."""
    paths = [folder / f"{name}.md"]
    atomic_write(paths[0], as_markdown(rows))
    figure = speedup_figure(rows)
    if figure is not None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        paths.append(folder / f"{name}.png")
        atomic_write(paths[1], buffer.getvalue())
    return paths


def as_markdown(rows: Sequence[Row]) -> str:
    """A table for each workload, sorted by speed-up."""
    kinds = {row.is_tower for row in rows}
    lines = ["\n\n".join([*[LEGEND] * (False in kinds), *[TOWER_LEGEND] * (True in kinds)])]
    for workload in dict.fromkeys(row.workload for row in rows):
        own = [row for row in rows if row.workload == workload]
        first = own[0]
        lines += [
            "",
            f"## {first.shape}, {first.size} × {first.size}, batch {first.batch}, {first.dtype}, {first.mode}",
            "",
            f"{first.device}; tomesd_plus {first.tomesd_plus}, torch {first.torch}, diffusers {first.diffusers}; "
            f"{_dates(own)}; {_runs(own)}.",
            "",
        ]
        header = TOWER_HEADER if first.is_tower else HEADER
        cells = [header, ["---"] * len(header), *(_cells(row) for row in sorted(own, key=_order))]
        lines += [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join(lines) + "\n"


def speedup_figure(rows: Sequence[Row]) -> Figure | None:
    """Plot speed-up over image size, with axes for each shape, batch, dtype, mode and device; ``None`` without data.

    Settings that were measured at one size only are drawn if all were.
    """
    timed = [row for row in rows if row.speedup and row.setting != UNTOUCHED.name]
    groups = list(dict.fromkeys((row.shape, *row.workload[2:]) for row in timed))
    if not groups:
        return None
    columns = min(2, len(groups))
    down = -(-len(groups) // columns)
    figure = Figure(figsize=(7.5 * columns, 4 * down), layout="constrained")
    axes = figure.subplots(down, columns, squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for axis, group in zip(axes.flat, groups):
        own = [row for row in timed if (row.shape, *row.workload[2:]) == group]
        axis.set_prop_cycle(color=[colormaps["tab20"](index) for index in range(MAX_LINES)])
        counts = Counter(row.label for row in own)  # settings with the most sizes come first, then presets
        if max(counts.values()) > 1:  # a single size makes no line
            counts = Counter({label: count for label, count in counts.items() if count > 1})
        for label in sorted(counts, key=lambda label: (-counts[label], not label.startswith("preset")))[:MAX_LINES]:
            line = sorted((row for row in own if row.label == label), key=lambda row: int(row.size))
            speedups = [float(row.speedup) for row in line]
            bars = [
                [float(row.speedup) - float(row.speedup_low) for row in line],
                [float(row.speedup_high) - float(row.speedup) for row in line],
            ]
            style = ":" if label.startswith(IDEAL) else "-"
            sizes = [int(row.size) for row in line]
            axis.errorbar(sizes, speedups, bars, fmt=f"o{style}", markersize=3, linewidth=0.9, capsize=2, label=label)
        ticks = sorted({int(row.size) for row in own})
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        shape, batch, dtype, mode, device, *_ = group
        axis.set(
            xlabel="pixels of a side", ylabel="speed-up", title=f"{shape}, batch {batch}, {dtype}, {mode}\n{device}"
        )
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _order(row: Row) -> tuple[bool, bool, float]:
    """Sort key: the untouched UNet first, then by speed-up, failures last."""
    return row.setting != UNTOUCHED.name, bool(row.note.startswith("failed")), float(row.speedup or 0)


def _dates(rows: Sequence[Row]) -> str:
    dates = [row.date for row in rows]
    return min(dates) if min(dates) == max(dates) else f"{min(dates)} to {max(dates)}"


def _runs(rows: Sequence[Row]) -> str:
    counts = [int(row.runs) for row in rows if row.runs]
    least, most = min(counts, default=0), max(counts, default=0)
    return f"{most} runs" if least == most else f"{least} to {most} runs"


def _cells(row: Row) -> list[str]:
    spread = f" [{row.step_ms_low}, {row.step_ms_high}]" if row.step_ms else ""
    speedup = ""
    if row.speedup:
        speedup = f"{float(row.speedup):.2f}× [{float(row.speedup_low):.2f}, {float(row.speedup_high):.2f}]"
    if row.is_tower:
        return [
            row.setting, row.ratio.removeprefix("r = "), row.images_per_second, row.step_ms + spread, speedup,
            row.efficiency, row.matching_ms, row.merging_ms, row.memory_mib, row.note.replace("|", "/"),
        ]  # fmt: skip
    return [
        row.setting, row.ratio, row.levels if row.ratio else "", row.step_ms + spread, speedup,
        row.efficiency, row.matching_ms, row.merging_ms, row.memory_mib, row.psnr, row.note.replace("|", "/"),
    ]  # fmt: skip
