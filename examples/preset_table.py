"""The presets by name beside fewer steps in the same time, over solvers and numbers of steps.

``python examples/preset_table.py CAPTIONS`` makes ``presets.csv`` and ``presets.md``: about half an hour on a core for
eight captions; with names of solvers after it, their rows anew. A cell where a preset is below fewer steps is one of
:data:`tomesd_plus.presets.tested.MISSES`. Costs of steps are Stable Diffusion 1.5's, 512 × 512 (``cpu.csv``,
``cache-steps.csv``); pictures are the embedded pipeline's.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch

from tomesd_plus import PRESETS, load_tiny_pipeline, preset
from tomesd_plus.presets.tested import STEPS
from tomesd_plus.tiny import held_out_captions
from tomesd_plus.tuning.pictures import Task, psnr_of, squared_error
from tomesd_plus.tuning.plans import Costs, Plan

COSTS = Costs(cached=0.08, skipped=0.0, cached_merged=0.045, full_merged=0.89)
SOLVERS = [
    ("DDIMScheduler", {}), ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}), ("EulerDiscreteScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}), ("UniPCMultistepScheduler", {}),
]  # fmt: skip
count = int(sys.argv[1]) if len(sys.argv) > 1 else 1
prompts = list(enumerate(held_out_captions()[340 : 340 + count]))
pipe = load_tiny_pipeline()
pipe.set_progress_bar_config(disable=True)
table = Path("presets.csv")
rows: list[list[Any]] = []
for kind, options in SOLVERS:
    solver = f"{kind}, Karras" if options.get("use_karras_sigmas") else kind
    if sys.argv[2:] and solver not in sys.argv[2:]:
        rows += [row for row in csv.reader(table.open(newline="")) if row[0] == solver]
        continue
    config = dict(pipe.scheduler.config) | {"use_karras_sigmas": False} | options
    pipe.scheduler = getattr(diffusers, kind).from_config(config)
    for steps in STEPS if count > 1 else STEPS[:1]:
        task = Task(pipe, steps, 3.0, 2000, 16, {})
        untouched = task.pictures(prompts)
        fewer: dict[int, float] = {}
        for name, chosen in PRESETS.items():
            with preset(pipe, name, force=True) as report:
                error = psnr_of(squared_error(task.pictures(prompts), untouched))
            assert report.cache is not None
            kinds = "".join({"full": "F", "cached": "C", "skipped": "S"}[step.kind] for step in report.cache.steps)
            calls = len(kinds)  # PNDM calls once more
            time = steps * Plan(kinds, merging="all" if chosen.merging else "none").cost(COSTS) / calls
            for each in (int(time), int(time) + 1):
                if each not in fewer:
                    fewer[each] = psnr_of(squared_error(task.pictures(prompts, each), untouched))
            share = time - int(time)
            beside = fewer[int(time)] * (1 - share) + fewer[int(time) + 1] * share
            rows.append([solver, steps, name, kinds, f"{steps / time:.2f}", f"{error:.2f}",
                         f"{time:.1f}", f"{beside:.2f}", "miss" if error < beside else "", count])  # fmt: skip
            print(*rows[-1], flush=True)
with table.open("w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["solver", "steps", "preset", "what ran", "speed-up", "PSNR dB", "fewer steps", "PSNR dB of these",
                     "below", "captions"])  # fmt: skip
    writer.writerows(rows)
head = " | ".join(f"{name}, dB (fewer steps)" for name in PRESETS)
lines = [f"| solver | steps | {head} |", "|---|--:|" + "--:|" * len(PRESETS)]
for at in range(0, len(rows), len(PRESETS)):
    cells = " | ".join(
        f"{row[4]}×: {row[5]} ({row[7]}){' **below**' if row[8] else ''}" for row in rows[at : at + len(PRESETS)]
    )
    lines.append(f"| {rows[at][0]} | {rows[at][1]} | {cells} |")
lines = [
    f"PSNR in dB to the untouched pictures, {rows[0][9]} captions that no preset was chosen on, and in brackets what "
    "fewer steps of the solver have in the same time, on the line between the two next numbers of steps.", "", *lines,
]  # fmt: skip
table.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
print(torch.__version__)
