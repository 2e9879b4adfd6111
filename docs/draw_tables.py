"""Write the tables of presets into the README and ``docs/figures.md``, from ``results/presets.csv``."""

import csv
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "results" / "presets.csv"
NAMES = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverMultistepScheduler, Karras": "DPM++ 2M Karras",
    "EulerDiscreteScheduler": "Euler",
    "PNDMScheduler": "PNDM",
    "UniPCMultistepScheduler": "UniPC",
}
SHORT = [("DDIMScheduler", 25), ("DPMSolverMultistepScheduler", 20), ("EulerDiscreteScheduler", 20)]
TABLES = {"README.md": SHORT, "docs/figures.md": None}  # all
MARKED = re.compile(r"(?<=<!-- table: presets -->\n).*?(?=<!-- end -->)", re.DOTALL)
Row = Mapping[str, str]


def table(rows: Sequence[Row], wanted: Sequence[tuple[str, int]] | None) -> str:
    """A row a solver and number of steps, three columns a preset: speed-up, PSNR, and that of fewer steps."""
    cells = {(row["solver"], int(row["steps"]), row["preset"]): row for row in rows}
    names = list(dict.fromkeys(row["preset"] for row in rows))
    places = list(dict.fromkeys(place[:2] for place in cells)) if wanted is None else wanted
    heads = [f"`{name}`: speed-up | dB | fewer steps, dB" for name in names]
    lines = [f"| solver, steps | {' | '.join(heads)} |", "|---|" + "--:|--:|--:|" * len(names)]
    for solver, steps in places:
        shown = []
        for name in names:
            row = cells[solver, steps, name]
            ours, theirs = f"{float(row['PSNR dB']):.1f}", f"{float(row['PSNR dB of these']):.1f}"
            shown.append(f"{float(row['speed-up']):.2f}× | {ours if row['below'] else f'**{ours}**'} | {theirs}")
        lines.append(f"| {NAMES.get(solver, solver)}, {steps} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def filled(text: str, wanted: Sequence[tuple[str, int]] | None) -> str:
    """A page with its table.

    Raises:
        ValueError: There is no place for it.
    """
    if not MARKED.search(text):
        raise ValueError("the page has no lines '<!-- table: presets -->' and '<!-- end -->'")
    with DATA.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return MARKED.sub(lambda _: table(rows, wanted), text)


def main() -> int:
    """Write them; the exit code is 1 if there are no figures."""
    if not DATA.exists():
        print(f"{DATA.name} is not there yet: python examples/preset_table.py 8, in results/", file=sys.stderr)
        return 1
    for name, wanted in TABLES.items():
        path = ROOT / name
        path.write_text(filled(path.read_text(), wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
