"""Results: one row per configuration, stored as ``results.json``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.file_io import read_json
from tomesd_plus.evaluation.manifests import checked_manifest
from tomesd_plus.evaluation.plain_data import checked
from tomesd_plus.evaluation.speed import Speed
from tomesd_plus.evaluation.words import printable
from tomesd_plus.metrics.intervals import Estimate

RESULTS = "results"


@dataclass(frozen=True)
class Result:
    """The results of one configuration.

    Args:
        name: Name of the configuration.
        images_at: The folder of its images.
        images: Number of scored images.
        failed: Number of items without an image.
        unreadable: Number of unreadable images.
        seeds: Seeds of the items.
        prompts: Source of the prompts.
        manifest: How the images were generated.
        metrics: Estimates by metric.
        references: Source of the reference images, by extractor name.
        speed: Times and memory, if measured.
        notes: Remarks for the reader of the table.
        unreadable_files: Names of the unreadable images, with the reasons.
        reference_skipped: Number of reference images that were left out, by extractor name and reason.
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
    unreadable_files: dict[str, str] = field(default_factory=dict)
    reference_skipped: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def conditions(self) -> str:
        """Everything but the configuration, in one line."""
        made, sampling = self.manifest, self.manifest["sampling"]
        size = f"{sampling['width']} × {sampling['height']}" if sampling["width"] else "the model's own size"
        model = "the embedded tiny model" if made["model"] == "tiny" else made["model"]
        references = "".join(f", {name} against {printable(source)}" for name, source in self.references.items())
        versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
        device = self.speed.device if self.speed else made["device"]
        return (
            f"{printable(model)}, {size}, {made['scheduler']['class']}, guidance {sampling['guidance_scale']:g}, "
            f"{made['dtype']}, {device}, prompts: {printable(self.prompts)}{references}; {versions}"
        )


def load_results(folder: Path) -> list[Result]:
    """Read ``results.json`` of a folder; an EvaluationError if it is missing or in another format."""
    path = folder / f"{RESULTS}.json"
    if not path.exists():
        raise EvaluationError(
            f"{folder} has no {path.name}: score it first (tomesd-plus evaluate score --out {folder})"
        )
    try:
        return [_row(entry, folder) for entry in read_json(path)["rows"]]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise EvaluationError(f"{path} is not an evaluation's: {error}") from error


def _row(entry: dict[str, Any], folder: Path) -> Result:
    metrics = {name: checked(Estimate, estimate) for name, estimate in entry.pop("metrics").items()}
    speed = entry.pop("speed")
    path = folder / entry.pop("images_at")
    more = {"images_at": path, "metrics": metrics, "speed": checked(Speed, speed) if speed else None}
    row = checked(Result, entry | more)
    checked_manifest(row.manifest, path)
    row.conditions  # noqa: B018  raises an error if the manifest lacks something
    return row
