"""Tuned plans beside presets, even caches, even skips and fewer steps, of several solvers, on captions not tuned on.

``python -m examples.front SOLVER CAPTIONS TUNED_ON GENERATIONS`` adds a solver's rows to ``front.csv`` and saves
its presets beside it; ``python -m examples.front draw`` makes ``front.md`` and ``front.png`` of them. Without
arguments: two captions, to see that it runs. Costs of steps are Stable Diffusion 1.5's, 512 × 512, float32, two CPU
cores (``cache-steps.csv``, ``cpu.csv``), in which speed-ups are told; pictures are the embedded pipeline's.
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from matplotlib.figure import Figure

from tomesd_plus import PRESETS, Preset, load_tiny_pipeline, tune
from tomesd_plus.evaluation.switches import AYS_STEPS, ays_timesteps, takes_timesteps
from tomesd_plus.presets.named import ON_ALL_STEPS, UNDER_A_CACHE
from tomesd_plus.tiny import held_out_captions
from tomesd_plus.tuning.pictures import Task, psnr_of, squared_error, switched_on
from tomesd_plus.tuning.plans import Costs, Merging, Plan, even_plans, untouched

SOLVERS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "dpm++2m": (DPMSolverMultistepScheduler, 20, {}),
    "dpm++2m-karras": (DPMSolverMultistepScheduler, 20, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, 20, {}),
    "unipc": (UniPCMultistepScheduler, 15, {}),
    "ddim": (DDIMScheduler, 25, {}),
}
COSTS = Costs(cached=0.08, skipped=0.0, cached_merged=0.045, full_merged=0.89)
SPEEDUPS = (3.0, 2.5, 4.0, 2.0)
LIMIT = 60  # steps of what stands for the solver's limit
COLUMNS = ["solver", "steps", "wanted", "kind", "plan", "merging", "calls with", "speed-up", "PSNR dB", "low", "high",
           "PSNR dB to the limit", "captions"]  # fmt: skip
KINDS = {"tuned": "tab:green", "preset": "tab:red", "even cache": "tab:blue", "even skip": "tab:orange",
         "fewer steps": "black"}  # fmt: skip


def measure(solver: str, count: int, tuned_on: int, generations: float, batch: int = 16) -> list[dict[str, Any]]:
    """The rows of a solver."""
    kind, steps, options = SOLVERS[solver]
    pipe = load_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    captions = held_out_captions()
    presets = tune(
        pipe, captions[200 : 200 + tuned_on], speedup=SPEEDUPS, costs=COSTS, steps="free", max_generations=generations,
        num_inference_steps=steps, guidance_scale=3.0, batch_size=batch,
    )  # fmt: skip
    task, prompts = Task(pipe, steps, 3.0, 1000, batch, {}), list(enumerate(captions[300 : 300 + count]))
    references, limit = task.pictures(prompts), task.pictures(prompts, LIMIT)
    known: dict[tuple[Plan, str], torch.Tensor] = {}

    def row(wanted: Any, kind: str, plan: Plan, name: str = "") -> dict[str, Any]:
        key = plan, name if kind == "fewer steps" else ""
        if key not in known:
            with switched_on(pipe, plan):
                known[key] = task.pictures(prompts, plan.steps)
        error, speedup = squared_error(known[key], references), steps / plan.cost(COSTS)
        figures = [speedup, psnr_of(error), *_interval(error), psnr_of(squared_error(known[key], limit))]
        values = [solver, steps, wanted, kind, name or str(plan), plan.merging, plan.steps]
        values += [*(f"{value:.2f}" for value in figures), count]
        print(*values, flush=True)
        return dict(zip(COLUMNS, values, strict=True))

    rows = [row("", "fewer steps", untouched(steps))]
    for wanted, chosen in zip(SPEEDUPS, presets, strict=True):
        chosen.save(f"front-{solver}-{wanted:g}.json")
    for wanted, chosen in zip(SPEEDUPS, presets, strict=True):
        assert chosen.measured is not None
        rows.append(row(wanted, "tuned", _plan(chosen)))
        rows.append(row(wanted, "fewer steps", untouched(int(steps / wanted + 1e-9))))
        even = even_plans(steps, steps / wanted, COSTS, [1] * steps, True)
        rows += [
            row(wanted, "even cache" if "C" in plan.letters else "even skip", plan)
            for plan in even
            if (plan.forecast, plan.order) == (1.0, 1)
        ]
    if takes_timesteps(pipe) and not options:  # of another solver's noise levels they would not be
        with ays_timesteps(pipe):
            rows.append(row(2.0, "fewer steps", untouched(AYS_STEPS), "Align Your Steps"))
    for name, chosen in PRESETS.items():
        rows.append(row("", "preset", _plan(chosen, steps), name))
    return rows


def _plan(chosen: Preset, steps: int = 0) -> Plan:
    """What a preset runs; of one by name at so many steps."""
    cache = chosen.cache
    if cache is None or cache.plan is None:
        return untouched(chosen.steps or 1)
    letters = cache.plan.letters
    if cache.plan.repeats:
        letters = "".join(cache.plan.at_number(number, number == steps - 1) for number in range(steps))
    mergings = {None: "none", UNDER_A_CACHE: "cached", ON_ALL_STEPS: "all"}
    return Plan(letters, cache.forecast, cache.order, cast(Merging, mergings[chosen.merging]))


def _interval(error: torch.Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean in dB, by resampling the captions."""
    generator = torch.Generator().manual_seed(0)
    means = [psnr_of(error[torch.randint(len(error), (len(error),), generator=generator)]) for _ in range(1000)]
    cuts = statistics.quantiles(means, n=40)
    return cuts[0], cuts[-1]


def add(rows: list[dict[str, Any]], path: Path) -> None:
    """Put rows into a table in place of those of the same solver."""
    old = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            old = [row for row in csv.DictReader(file) if row["solver"] != rows[0]["solver"]]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows([*old, *rows])


def draw(path: Path) -> None:
    """A picture for each solver beside the others, and a table of the best of each kind at each speed-up.

    The picture has each row at its own speed-up. The table tells it with each figure, and has fewer steps at the time
    of the tuned plan.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    figure = Figure(figsize=(3.4 * len(solvers), 3.6), layout="constrained")
    lines = [
        f"| solver | | {' | '.join(f'{each:g}×' for each in sorted(SPEEDUPS))} |",
        "|---|---|" + "--:|" * len(SPEEDUPS),
    ]
    for axes, solver in zip(figure.subplots(1, len(solvers), sharey=True, squeeze=False)[0], solvers):
        own = [row for row in rows if row["solver"] == solver and float(row["speed-up"]) > 1]
        best = best_of(own)
        for kind, colour in KINDS.items():
            points = sorted((float(row["speed-up"]), float(row["PSNR dB"])) for row in own if row["kind"] == kind)
            if kind != "preset":
                points = sorted({(float(row["speed-up"]), float(row["PSNR dB"])) for row in best[kind].values()})
                cells = [cell(kind, best, f"{each}", own) for each in sorted(SPEEDUPS)]
                lines.append(f"| {solver} {own[0]['steps']} | {kind} | {' | '.join(cells)} |")
            axes.plot(*zip(*points), marker="o", markersize=4, color=colour, label=kind,
                      linestyle="" if kind == "preset" else "-", linewidth=1)  # fmt: skip
        axes.set_title(f"{solver}, {own[0]['steps']} steps", fontsize=10)
        axes.set_xlabel("speed-up of the denoising calls")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("PSNR to the untouched pictures, dB")
    figure.axes[-1].legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    head = (
        f"PSNR in dB to the untouched pictures, mean of {rows[0]['captions']} captions that nothing was chosen on, "
        "and in brackets the speed-up by the costs of Stable Diffusion 1.5's shape, at least that of the column. "
        "Fewer steps without a bracket are in the time of the tuned plan, on the line between the two next numbers "
        "of steps in front.csv, Align Your Steps left out; with one, they are the next ones, as there is no such "
        "line.\n\n"
    )
    path.with_suffix(".md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def cell(kind: str, best: dict[str, dict[str, dict[str, str]]], wanted: str, rows: list[dict[str, str]]) -> str:
    """A figure of the table: fewer steps in the tuned plan's time, all else with its own speed-up."""
    if wanted not in best[kind]:
        return ""
    row = best[kind][wanted]
    if kind == "fewer steps" and wanted in best["tuned"]:
        beside = in_the_time(rows, float(best["tuned"][wanted]["speed-up"]))
        if beside is not None:
            return f"{beside:.2f}"
    return f"{row['PSNR dB']} ({row['speed-up']}×)"


def in_the_time(rows: list[dict[str, str]], speedup: float) -> float | None:
    """The PSNR of fewer steps at a speed-up, on the line over time between the two next rows; None outside them."""
    steps = [row for row in rows if row["kind"] == "fewer steps" and set(row["plan"]) == {"F"}]
    times = {1 / float(row["speed-up"]): float(row["PSNR dB"]) for row in steps}
    time = 1 / speedup
    below, above = [each for each in times if each <= time], [each for each in times if each >= time]
    if not below or not above:
        return None
    low, high = max(below), min(above)
    share = (time - low) / (high - low) if high > low else 0.0
    return times[low] * (1 - share) + times[high] * share


def best_of(rows: list[dict[str, str]]) -> dict[str, dict[str, dict[str, str]]]:
    """Of each kind the closest row at each speed-up that was wanted."""
    best: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: float(row["PSNR dB"])):
        best[row["kind"]][row["wanted"]] = row
    return best


if __name__ == "__main__":
    if sys.argv[1:] == ["draw"]:
        draw(Path("front.csv"))
    else:
        solver, *numbers = sys.argv[1:] or ("dpm++2m", "2", "2", "5")
        add(measure(solver, *map(int, numbers)), Path("front.csv"))
        print(json.dumps({"torch": torch.__version__, "solver": solver}))
