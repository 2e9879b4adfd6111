"""Make the files of a report again, or join several evaluations in one."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tomesd_plus.evaluation.reporting.evaluation_plots import save_pictures
from tomesd_plus.evaluation.scoring.results import Result, load_results
from tomesd_plus.evaluation.scoring.tables import save_results


def joined(folders: Sequence[Path]) -> list[Result]:
    """The rows of several evaluations; where there is more than one, names start with the folder's.

    Folders of one name are told apart by those above them, as far up as they differ.
    """
    if len(folders) == 1:
        return load_results(folders[0])
    paths = [folder.resolve() for folder in folders]
    labels = [path.name for path in paths]
    if len(set(labels)) < len(labels):
        above = os.path.commonpath([path.parent for path in paths])
        labels = [path.relative_to(above).as_posix() for path in paths]
    return [
        replace(row, name=f"{label}: {row.name}")
        for label, folder in zip(labels, folders, strict=True)
        for row in load_results(folder)
    ]


def write_report(rows: Sequence[Result], out: Path) -> list[Path]:
    """Write tables and pictures into a folder; returns the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    save_results(rows, out)
    return save_pictures(rows, out)
