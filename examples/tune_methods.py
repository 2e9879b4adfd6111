"""Ways to choose a plan at equal work: dynamic programming with its finalists on pictures, and random local search.

``python -m examples.tune_methods STEPS TUNED_ON GENERATIONS CAPTIONS`` writes ``tune-methods.csv``: DPM++ 2M on the
embedded pipeline, at 2.5 times the speed by the costs of Stable Diffusion 1.5, figures on captions that were chosen on
and on others. Random local search starts from the best even plan that was tried, and keeps a random change of one or
two steps if it is closer.
"""

import csv
import random
import sys
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler

from tomesd_plus import load_tiny_pipeline
from tomesd_plus.tiny import held_out_captions
from tomesd_plus.tuning.choose import best_of, budget_of, choose, simple_plans
from tomesd_plus.tuning.pictures import Task, psnr_of, squared_error, switched_on
from tomesd_plus.tuning.plans import Costs, Plan, neighbours, untouched
from tomesd_plus.tuning.trials import Trials

COSTS = Costs(cached=0.08)
SPEEDUP = 2.5


def random_search(trials: Trials, seed: int) -> Plan | None:
    """From the best even plan by random changes, as long as there is work left."""
    draw = random.Random(seed)
    trials.recording(trials.task.steps)
    for plan in simple_plans(trials, SPEEDUP, free=False):
        trials.error(plan)
    while trials.left > 0 and (best := best_of(trials, SPEEDUP, free=False)) is not None:
        near = [plan for plan in neighbours(best, True) if plan not in trials.tried]
        near = [plan for plan in near if trials.cost(plan) <= budget_of(trials, SPEEDUP)]
        if not near:
            break
        trials.error(draw.choice(near))
    return best_of(trials, SPEEDUP, free=False)


def main(steps: int, tuned_on: int, generations: int, captions: int) -> None:
    """Write the table."""
    pipe = load_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    texts = held_out_captions()
    chosen_on = list(enumerate(texts[200 : 200 + tuned_on]))
    others = list(enumerate(texts[300 : 300 + captions]))
    task, aside = Task(pipe, steps, 3.0, 0, 8, {}), Task(pipe, steps, 3.0, 1000, 8, {})

    def trials() -> Trials:
        return Trials(task, chosen_on, COSTS, generations, True, lambda amount, what: None)

    planned, searched = trials(), trials()
    for _ in choose(planned, [SPEEDUP], free=False):
        pass
    found = {"dynamic programming, then pictures": (planned, best_of(planned, SPEEDUP, free=False))}
    found["random local search"] = searched, random_search(searched, 0)
    simple = [plan for plan in simple_plans(searched, SPEEDUP, free=False) if plan in searched.tried]
    found["the best even plan"] = searched, max(simple, key=searched.psnr)
    found["fewer steps"] = searched, untouched(int(steps / SPEEDUP))
    references = aside.pictures(others)
    with Path("tune-methods.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        names = ["method", "plan", "steps", "speed-up", "work", "PSNR dB chosen on", "PSNR dB others", "captions"]
        table.writerow([*names, "torch"])
        for name, (own, plan) in found.items():
            assert plan is not None
            with switched_on(pipe, plan):
                error = squared_error(aside.pictures(others, plan.steps), references)
            figures = [
                f"{own.speedup(plan):.2f}",
                f"{own.spent:.1f}",
                f"{own.psnr(plan):.2f}",
                f"{psnr_of(error):.2f}",
            ]
            table.writerow([name, plan, steps, *figures, captions, torch.__version__])
            file.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or ("6", "1", "5", "1")))
