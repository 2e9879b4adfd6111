"""Figures of one row that are made together, kept beside its images: none is made twice, and none is lost."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.file_io import digest, read_json, write_json
from tomesd_plus.metrics.intervals import Estimate

PREFIX = "score-"


@dataclass(frozen=True)
class Part:
    """What one extractor, or one comparison with the baseline, says of a row.

    Args:
        of: What was asked for: extractor, reference, resamples.
        images: What it was asked of; see :func:`files_digest`.
        metrics: Estimates by name.
        notes: What a reader of the figures must know.
        unreadable: Images that could not be read.
        references: What distances are to, by the extractor's name.
    """

    of: str
    images: str
    metrics: dict[str, Estimate] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    references: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it into a row's folder."""
        words = re.sub(r"[^\w]+", "-", self.of)[:40].strip("-").lower()
        write_json(folder / f"{PREFIX}{words}-{digest(self.of)[:8]}.json", asdict(self))


def load_parts(folder: Path, images: Iterable[str]) -> dict[str, Part]:
    """All parts in a row's folder that are of these images, by what was asked for."""
    wanted, parts = set(images), {}
    for path in sorted(folder.glob(f"{PREFIX}*.json")):
        try:
            entry = read_json(path)
            metrics = {name: Estimate(**estimate) for name, estimate in entry.pop("metrics").items()}
            part = Part(metrics=metrics, **entry)
        except (EvaluationError, AttributeError, KeyError, TypeError):  # of another version: it is made anew
            continue
        if part.images in wanted:
            parts[part.of] = part
    return parts
