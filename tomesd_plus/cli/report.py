"""``tomesd-plus report``: the tables and plots of evaluations, made again or joined."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tomesd_plus.cli.common import check_writable, console, fail, quiet, run

if TYPE_CHECKING:
    from tomesd_plus.evaluation.scoring.results import Result

HIDDEN = ("seeds", "ms / step", "peak MiB", "made with")  # the files have them
MIN_WIDTH = 140


def report_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders of evaluations that were scored.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write to. Default: the evaluation's own; required for several.")
    ] = None,
) -> None:
    """Make an evaluation's tables and plots again, or join several in one."""
    if out is None:
        if len(folders) > 1:
            fail("several evaluations need --out, a folder for their report")
        out = folders[0]
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        fail("each evaluation can be named once")
    if len(folders) > 1 and out.resolve() in places:
        fail(f"--out {out} would overwrite the results of one of the evaluations: choose another folder")
    quiet()
    from tomesd_plus.evaluation.reporting.report import joined, write_report

    results = run(lambda: joined(folders))
    check_writable(out)
    print_report(results, run(lambda: write_report(results, out)), out)


def print_report(results: "Sequence[Result]", pictures: Sequence[Path], out: Path) -> None:
    """Print the table without its intervals, what it was made with, notes, and which files there are."""
    from tomesd_plus.evaluation.scoring.results import RESULTS
    from tomesd_plus.evaluation.scoring.tables import conditions, notes, table

    header, rows = table(results)
    grid = Table(caption="With intervals and all else in the files below.", caption_justify="left")
    shown = [index for index, name in enumerate(header) if name not in HIDDEN and any(row[index] for row in rows)]
    for index in shown:
        grid.add_column(escape(header[index]), justify="right" if index else "left", min_width=None if index else 26)
    for row in rows:
        grid.add_row(*(escape(re.sub(r" \[.*\]", "", row[index])) for index in shown))
    Console(width=max(console.width, MIN_WIDTH)).print(grid)  # a narrow terminal would cut the figures off
    for line in [*conditions(results), *notes(results)]:
        console.print(escape(line), soft_wrap=True)
    written = [*(out / f"{RESULTS}.{suffix}" for suffix in ("json", "csv", "md")), *pictures]
    console.print("Written: " + escape(", ".join(map(str, written))), soft_wrap=True)
