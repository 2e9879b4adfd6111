"""The table of an evaluation, as data and as files: JSON with everything, CSV, Markdown."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.files import atomic_write, read_json, write_json
from tomesd_plus.evaluation.intervals import Estimate
from tomesd_plus.evaluation.speed import Speed

RESULTS = "results"
FIDELITY = ("PSNR", "SSIM", "LPIPS")


@dataclass(frozen=True)
class Result:
    """What one configuration gave.

    Args:
        name: The configuration's.
        images_at: The folder of its images.
        images: How many were scored.
        failed: Items that gave no image.
        unreadable: Images that could not be read.
        seeds: Of the items.
        prompts: Where the prompts come from.
        manifest: How the images were made.
        metrics: Estimates by name.
        references: What distances are to, by the extractor's name.
        speed: Times and memory, where they were measured.
        notes: What a reader of the figures must know.
    """

    name: str
    images_at: Path
    images: int
    failed: int
    unreadable: int
    seeds: list[int]
    prompts: str
    manifest: dict[str, Any]
    metrics: dict[str, Estimate] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    speed: Speed | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def conditions(self) -> str:
        """All but the configuration, in a line."""
        made, sampling = self.manifest, self.manifest["sampling"]
        size = f"{sampling['width']} × {sampling['height']}" if sampling["width"] else "the model's own size"
        model = "the embedded tiny model" if made["model"] == "tiny" else made["model"]
        references = "".join(f", {name} against {source}" for name, source in self.references.items())
        versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
        device = self.speed.device if self.speed else made["device"]
        return (
            f"{model}, {size}, {made['scheduler']['class']}, guidance {sampling['guidance_scale']:g}, "
            f"{made['dtype']}, {device}, prompts: {self.prompts}{references}; {versions}"
        )


def save_results(rows: Sequence[Result], out: Path) -> None:
    """Write ``results.json``, ``results.csv`` and ``results.md`` into a folder."""
    entries = [{**asdict(row), "images_at": os.path.relpath(row.images_at, out)} for row in rows]
    write_json(out / f"{RESULTS}.json", {"rows": entries})
    atomic_write(out / f"{RESULTS}.csv", as_csv(rows))
    atomic_write(out / f"{RESULTS}.md", as_markdown(rows))


def load_results(folder: Path) -> list[Result]:
    """Read ``results.json`` of a folder; an EvaluationError if there is none, or if it is another program's."""
    path = folder / f"{RESULTS}.json"
    if not path.exists():
        raise EvaluationError(
            f"{folder} has no {path.name}: score it first (tomesd-plus evaluate score --out {folder})"
        )
    try:
        return [_row(entry, folder) for entry in read_json(path)["rows"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{path} is not an evaluation's: {error}") from error


def table(rows: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: what is printed, and what Markdown shows."""
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
    """A line for each letter in the column "made with"."""
    return [f"{chr(ord('a') + index)}: {text}" for index, text in enumerate(_conditions(rows))]


def notes(rows: Sequence[Result]) -> list[str]:
    """All rows' notes, each once."""
    return list(dict.fromkeys(note for row in rows for note in row.notes))


def legend() -> str:
    """How to read the table."""
    return (
        "Brackets: 95 % intervals (bootstrap over images) of figures; least and greatest of speed-ups. Times are "
        "medians, interleaved with the baseline's. A difference inside that of the noise floor is no result."
    )


def as_markdown(rows: Sequence[Result]) -> str:
    """The table, what it was made with, and notes."""
    header, cells = table(rows)
    lines = [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *cells)]
    lines += ["", legend(), "", "Made with:", "", *(f"- {line}" for line in conditions(rows))]
    if notes(rows):
        lines += ["", "Notes:", "", *(f"- {line}" for line in notes(rows))]
    return "\n".join(lines) + "\n"


def as_csv(rows: Sequence[Result]) -> str:
    """A line a row, with all that decides about its figures."""
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
    """Share of tokens removed at each downsample, the mean over the steps."""
    levels = sorted({level for step in speed.removed for level in step["removed"]}, key=int)
    return {
        level: sum(step["removed"].get(level, 0.0) for step in speed.removed) / len(speed.removed) for level in levels
    }


def _row(entry: dict[str, Any], folder: Path) -> Result:
    metrics = {name: Estimate(**estimate) for name, estimate in entry.pop("metrics").items()}
    speed = entry.pop("speed")
    path = folder / entry.pop("images_at")
    return Result(images_at=path, metrics=metrics, speed=Speed(**speed) if speed else None, **entry)


def _metrics(rows: Sequence[Result]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    return sorted(names, key=lambda name: not name.startswith(FIDELITY))  # these first; the baseline has none


def _conditions(rows: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(row.conditions for row in rows))


def _seeds(seeds: Sequence[int]) -> str:
    return f"{seeds[0]}–{seeds[-1]}" if len(seeds) > 2 else ", ".join(map(str, seeds))


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    interval = "" if estimate.low is None else f" [{estimate.low:.4g}, {estimate.high:.4g}]"
    return f"{estimate.value:.4g}{interval}"
