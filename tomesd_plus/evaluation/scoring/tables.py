"""Write results as JSON, CSV and Markdown.

The standard library writes CSV: pandas would write integers as floats in columns with gaps, and needs another package
for Markdown.
"""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tomesd_plus.evaluation.file_io import atomic_write, write_json
from tomesd_plus.evaluation.scoring.results import RESULTS, Result
from tomesd_plus.evaluation.speed import Speed
from tomesd_plus.evaluation.words import printable
from tomesd_plus.metrics.intervals import Estimate

FIDELITY = ("PSNR", "SSIM", "LPIPS")


def save_results(rows: Sequence[Result], out: Path) -> None:
    """Write ``results.json``, ``results.csv`` and ``results.md`` to a folder."""
    entries = [{**asdict(row), "images_at": os.path.relpath(row.images_at, out)} for row in rows]
    write_json(out / f"{RESULTS}.json", {"rows": entries})
    atomic_write(out / f"{RESULTS}.csv", as_csv(rows))
    atomic_write(out / f"{RESULTS}.md", as_markdown(rows))


def table(rows: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table that is printed and written as Markdown."""
    metrics = _metrics(rows)
    made_with = _conditions(rows)
    header = ["configuration", "images", "seeds", "steps", "s / image", "ms / step", "speed-up", "peak MiB",
              "tokens removed", *metrics, "made with"]  # fmt: skip
    cells = []
    for row in rows:
        speed = ["", "", "", "", ""]
        if row.speed:
            speed = [
                f"{row.speed.seconds:.3g}",
                f"{1000 * row.speed.step_seconds:.3g}",
                f"{row.speed.speedup:.2f}× [{row.speed.speedup_low:.2f}, {row.speed.speedup_high:.2f}]",
                f"{row.speed.memory_mib:.0f}",
                ", ".join(f"{share:.0%} at {level}" for level, share in mean_removed(row.speed).items() if share),
            ]
        lost = f" ({row.failed + row.unreadable} lost)" if row.failed + row.unreadable else ""
        figures = [_cell(row.metrics.get(name)) for name in metrics]
        letter = chr(ord("a") + made_with.index(row.conditions))
        cells.append([row.name, f"{row.images}{lost}", _seeds(row.seeds), str(row.manifest["sampling"]["steps"]),
                      *speed, *figures, letter])  # fmt: skip
    return header, cells


def conditions(rows: Sequence[Result]) -> list[str]:
    """The conditions for each letter in the column "made with"."""
    return [f"{chr(ord('a') + index)}: {text}" for index, text in enumerate(_conditions(rows))]


def notes(rows: Sequence[Result]) -> list[str]:
    """The notes of all rows, without duplicates."""
    return list(dict.fromkeys(note for row in rows for note in row.notes))


def legend() -> str:
    """An explanation of the table."""
    return (
        "Brackets: 95 % intervals (bootstrap over images) of metrics; minimum and maximum of speed-ups. Times are "
        "medians of runs interleaved with the baseline. A difference within the noise floor is not a result."
    )


def as_markdown(rows: Sequence[Result]) -> str:
    """The table with its conditions and notes."""
    header, cells = table(rows)
    lines = [f"| {' | '.join(map(_in_table, line))} |" for line in (header, ["---"] * len(header), *cells)]
    lines += ["", legend(), "", "Made with:", "", *(f"- {line}" for line in conditions(rows))]
    if notes(rows):
        lines += ["", "Notes:", "", *(f"- {line}" for line in notes(rows))]
    return "\n".join(lines) + "\n"


def _in_table(cell: str) -> str:
    """A configuration's name may hold what ends a cell or a line."""
    return printable(cell).replace("|", "\\|")


def as_csv(rows: Sequence[Result]) -> str:
    """A line per row, with everything that determines its metrics."""
    lines = []
    for row in rows:
        made, sampling, speed = row.manifest, row.manifest["sampling"], row.speed
        line: dict[str, Any] = {
            "configuration": row.name, "images": row.images, "failed": row.failed, "unreadable": row.unreadable,
            "model": made["model"], "prompts": row.prompts, "seeds": _seeds(row.seeds), "steps": sampling["steps"],
            "scheduler": made["scheduler"]["class"], "guidance_scale": sampling["guidance_scale"],
            "height": sampling["height"], "width": sampling["width"], "dtype": made["dtype"],
            "device": speed.device if speed else made["device"], **made["versions"],
            "references": "; ".join(f"{name}: {source}" for name, source in row.references.items()),
        }  # fmt: skip
        if speed:
            line |= {
                "seconds": speed.seconds, "step_seconds": speed.step_seconds, "speedup": speed.speedup,
                "speedup_low": speed.speedup_low, "speedup_high": speed.speedup_high, "timed_runs": speed.runs,
                "batch_size": speed.batch_size, "memory_mib": speed.memory_mib,
            }  # fmt: skip
        for name, estimate in row.metrics.items():
            line |= {name: estimate.value, f"{name} low": estimate.low, f"{name} high": estimate.high,
                     f"{name} images": estimate.count}  # fmt: skip
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def mean_removed(speed: Speed) -> dict[str, float]:
    """Share of tokens removed at each downsample; mean over the steps."""
    levels = sorted({level for step in speed.removed for level in step["removed"]}, key=int)
    return {
        level: sum(step["removed"].get(level, 0.0) for step in speed.removed) / len(speed.removed) for level in levels
    }


def _metrics(rows: Sequence[Result]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    return sorted(
        names, key=lambda name: not name.startswith(FIDELITY)
    )  # these come first, although the first row, the baseline, has none


def _conditions(rows: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(row.conditions for row in rows))


def _seeds(seeds: Sequence[int]) -> str:
    return f"{seeds[0]}–{seeds[-1]}" if len(seeds) > 2 else ", ".join(map(str, seeds))


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    interval = "" if estimate.low is None else f" [{estimate.low:.4g}, {estimate.high:.4g}]"
    return f"{estimate.value:.4g}{interval}"
