"""Write the tables and plots of one or several evaluations."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tomesd_plus.evaluation.reporting.evaluation_plots import save_plots
from tomesd_plus.evaluation.scoring.results import Result, load_results
from tomesd_plus.evaluation.scoring.tables import save_results


def joined(folders: Sequence[Path]) -> list[Result]:
    """The rows of several evaluations; if there is more than one, names are prefixed with the folder's name.

    For folders of the same name, the prefix is the path from their common parent.
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
    """Write tables and plots to a folder; returns the paths of the plots."""
    out.mkdir(parents=True, exist_ok=True)
    save_results(rows, out)
    return save_plots(rows, out)
