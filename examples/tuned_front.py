"""Tuned plans beside presets, even caches, even skips and fewer steps, of several solvers, on captions not tuned on.

``python -m examples.tuned_front SOLVER CAPTIONS TUNED_ON GENERATIONS`` adds a solver's rows to ``front.csv`` and saves
its presets beside it; ``python -m examples.tuned_front draw`` makes ``front.md`` and ``front.png`` of them. Without
arguments: two captions, to see that it runs. Costs of steps are Stable Diffusion 1.5's, 512 × 512, float32, two CPU
cores (``cache-steps.csv``, ``cpu.csv``), in which speed-ups are told; pictures are the embedded pipeline's.
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from matplotlib.figure import Figure

from tomesd_plus import PRESETS, Preset, load_tiny_pipeline, preset, tune
from tomesd_plus.tiny import held_out_captions
from tomesd_plus.tuning.pictures import Task, psnr_of, squared_error, switched_on
from tomesd_plus.tuning.plans import Costs, Plan, even_plans, untouched

SOLVERS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "dpm++2m": (DPMSolverMultistepScheduler, 20, {}),
    "dpm++2m-karras": (DPMSolverMultistepScheduler, 20, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, 20, {}),
    "unipc": (UniPCMultistepScheduler, 15, {}),
    "ddim": (DDIMScheduler, 25, {}),
}
COSTS = Costs(cached=0.08, skipped=0.0)
MERGED = {"cached": 0.045, "full": 0.89}  # of a step of the presets
SPEEDUPS = (2.5, 3.0, 2.0, 4.0)
COLUMNS = ["solver", "steps", "wanted", "kind", "plan", "calls with", "speed-up", "PSNR dB", "low", "high", "captions"]
KINDS = {"tuned": "tab:green", "even cache": "tab:blue", "even skip": "tab:orange", "fewer steps": "black",
         "preset": "tab:red"}  # fmt: skip


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
    references = task.pictures(prompts)
    known: dict[tuple[Plan, str], torch.Tensor] = {}

    def row(wanted: Any, kind: str, plan: Plan, speedup: float, name: str = "") -> dict[str, Any]:
        if (plan, name) not in known:
            if name:
                with preset(pipe, name):
                    known[plan, name] = squared_error(task.pictures(prompts), references)
            else:
                with switched_on(pipe, plan):
                    known[plan, name] = squared_error(task.pictures(prompts, plan.steps), references)
        error = known[plan, name]
        low, high = _interval(error)
        figures = [f"{value:.2f}" for value in (speedup, psnr_of(error), low, high)]
        values = [solver, steps, wanted, kind, name or str(plan), plan.steps, *figures, count]
        print(*values, flush=True)
        return dict(zip(COLUMNS, values, strict=True))

    rows = []
    for wanted, chosen in zip(SPEEDUPS, presets, strict=True):
        chosen.save(f"front-{solver}-{wanted:g}.json")
    for wanted, chosen in zip(SPEEDUPS, presets, strict=True):
        assert chosen.measured is not None
        rows.append(row(wanted, "tuned", _plan(chosen), chosen.measured.speedup))
        fewer = untouched(int(steps / wanted + 1e-9))
        rows.append(row(wanted, "fewer steps", fewer, steps / fewer.steps))
        for best in (each for each in chosen.measured.beside if not each.name.endswith(" steps")):
            kind_ = "even cache" if "C" in best.name else "even skip"  # the better of them on the captions tuned on
            rows += [
                row(wanted, kind_, plan, steps / plan.cost(COSTS))
                for plan in even_plans(steps, steps / wanted, COSTS, [1] * steps, True)
                if plan.letters == best.name and plan.forecast == 1.0 and plan.order == 1
            ]
    for name in PRESETS:
        letters = _letters_of(pipe, PRESETS[name], steps)
        full = MERGED["full"] if name == "fast" else 1.0
        cost = letters.count("F") * full + letters.count("C") * MERGED["cached"]
        rows.append(row("", "preset", Plan(letters), steps / cost, name))
    return rows


def _plan(chosen: Preset) -> Plan:
    cache = chosen.cache
    if cache is None or cache.plan is None:
        return untouched(chosen.steps or 1)
    return Plan(cache.plan.letters, cache.forecast, cache.order)


def _letters_of(pipe: Any, chosen: Preset, steps: int) -> str:
    """Which steps of a preset are full, seen in a generation."""
    with preset(pipe, chosen) as report:
        pipe("a star", num_inference_steps=steps, guidance_scale=3.0, output_type="latent")
    assert report.cache is not None
    return "".join("F" if step.full else "C" for step in report.cache.steps)


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
    """A picture for each solver beside the others, and a table of the best of each kind at each speed-up."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    figure = Figure(figsize=(3.4 * len(solvers), 3.6), layout="constrained")
    lines = [
        f"| solver | | {' | '.join(f'{each:g}×' for each in sorted(SPEEDUPS))} |",
        "|---|---|" + "--:|" * len(SPEEDUPS),
    ]
    for axes, solver in zip(figure.subplots(1, len(solvers), sharey=True, squeeze=False)[0], solvers):
        own = [row for row in rows if row["solver"] == solver]
        best = best_of(own)
        for kind, colour in KINDS.items():
            points = sorted((float(row["speed-up"]), float(row["PSNR dB"])) for row in own if row["kind"] == kind)
            if kind != "preset":
                points = sorted({(float(row["speed-up"]), float(row["PSNR dB"])) for row in best[kind].values()})
                cells = [best[kind].get(f"{each}", {}).get("PSNR dB", "") for each in sorted(SPEEDUPS)]
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
        f"PSNR in dB to the untouched pictures, mean of {rows[0]['captions']} captions that nothing was chosen on, at "
    )
    head += "least so fast; costs of Stable Diffusion 1.5's shape.\n\n"
    path.with_suffix(".md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


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
