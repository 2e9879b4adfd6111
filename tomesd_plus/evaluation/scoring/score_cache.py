"""A cache of scores: metrics that are computed together are stored in the folder of their images."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.file_io import digest, read_json, write_json
from tomesd_plus.evaluation.plain_data import checked
from tomesd_plus.metrics.intervals import Estimate

PREFIX = "score-"


@dataclass(frozen=True)
class Part:
    """The metrics of one configuration by one extractor, or by one comparison with the baseline.

    Args:
        of: The request, which is the key: extractor or metrics, reference, number of resamples.
        images: Hash of the images; see :func:`~tomesd_plus.evaluation.file_io.files_digest`.
        metrics: Estimates by metric.
        notes: Remarks for the reader of the table.
        unreadable: Names of unreadable images, with the reasons.
        references: Source of the reference images, by extractor name.
        skipped: Number of reference images that were left out, by extractor name and reason.
    """

    of: str
    images: str
    metrics: dict[str, Estimate] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the part to the folder of the images."""
        words = re.sub(r"[^\w]+", "-", self.of)[:40].strip("-").lower()
        write_json(folder / f"{PREFIX}{words}-{digest(self.of)[:8]}.json", asdict(self))


def load_parts(folder: Path, images: Iterable[str]) -> dict[str, Part]:
    """Load the parts in a folder that were computed from these images (hashes), by request."""
    wanted, parts = set(images), {}
    for path in sorted(folder.glob(f"{PREFIX}*.json")):
        try:
            entry = read_json(path)
            metrics = {name: checked(Estimate, estimate) for name, estimate in entry.pop("metrics").items()}
            part = checked(Part, entry | {"metrics": metrics})
        except (EvaluationError, AttributeError, LookupError, TypeError, ValueError):
            continue  # written by another version, or damaged: compute it again
        if part.images in wanted:
            parts[part.of] = part
    return parts
