"""An adaptive ratio against schedules that remove as many tokens on average, on the embedded pipeline.

``python examples/adaptive_ratio.py PROMPTS STEPS`` writes ``adaptive-ratio.csv``; 2 prompts and 4 steps by default.
"""

import csv
import statistics
import sys
from math import sqrt
from pathlib import Path

from tomesd_plus import load_tiny_pipeline
from tomesd_plus.evaluation.configurations import Configuration
from tomesd_plus.evaluation.generation import Row, Sampling, compare
from tomesd_plus.tiny import held_out_captions

SIMILARITIES = [0.95, 0.9, 0.8, 0.6]
RATIOS = [0.0, 0.25, 0.5, 0.75]
SCHEDULES = ["constant", "cosine"]

prompts, steps = map(int, sys.argv[1:] or ["2", "4"])
pipe = load_tiny_pipeline()
pipe.set_progress_bar_config(disable=True)


def run(configurations: list[Configuration]) -> list[Row]:
    """The same captions and seeds each time."""
    return compare(pipe, held_out_captions()[:prompts], configurations, Sampling(steps, 3.0)).rows


def line(similarity: float, row: Row, constant: Row) -> dict[str, str]:
    """Of the table: PSNR in dB, and by how much it is above the constant ratio's, with a 95 % interval."""
    shares = [removed[1] for removed in row.removed_by_prompt]
    above = [own - other for own, other in zip(row.psnr, constant.psnr, strict=True)]
    return {
        "similarity": f"{similarity:g}",
        "ratio": row.name,
        "mean share removed": f"{statistics.fmean(shares):.3f}",
        "least": f"{min(shares):.3f}",
        "greatest": f"{max(shares):.3f}",
        "PSNR dB": f"{statistics.fmean(row.psnr):.2f}",
        "above constant dB": f"{statistics.fmean(above):.2f}",
        "±": f"{1.96 * statistics.stdev(above) / sqrt(prompts):.2f}",
    }


adaptive = run(
    [
        Configuration("adaptive", {"merge": {"ratio": {"similarity": similarity, "ratios": RATIOS}}})
        for similarity in SIMILARITIES
    ]
)
table = []
for similarity, row in zip(SIMILARITIES, adaptive, strict=True):
    mean = row.removed[1]
    others = run([Configuration(name, {"merge": {"ratio": mean, "schedule": name}}) for name in SCHEDULES])
    table += [line(similarity, each, others[0]) for each in (row, *others)]
with Path("adaptive-ratio.csv").open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
