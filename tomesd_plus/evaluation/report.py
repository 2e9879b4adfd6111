"""Make the files of a report again, or join several evaluations in one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tomesd_plus.evaluation.pictures import save_pictures
from tomesd_plus.evaluation.results import Result, load_results, save_results


def joined(folders: Sequence[Path]) -> list[Result]:
    """The rows of several evaluations; where there is more than one, names start with the folder's."""
    if len(folders) == 1:
        return load_results(folders[0])
    return [
        replace(row, name=f"{folder.resolve().name}: {row.name}") for folder in folders for row in load_results(folder)
    ]


def write_report(rows: Sequence[Result], out: Path) -> list[Path]:
    """Write tables and pictures into a folder; returns the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    save_results(rows, out)
    return save_pictures(rows, out)
