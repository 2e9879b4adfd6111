"""What steps of each kind cost, a step of each in turn: full, cached, skipped, the same with merging, merging alone.

``python examples/step_costs.py SHAPE SIZE ROUNDS`` writes ``step-costs-SHAPE.csv``, with what presets come to at those
costs; a tiny UNet, 64 pixels and 2 rounds by default. With OMP_NUM_THREADS=1 times are what the thread has run.
"""

import csv
import statistics
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import torch

from tomesd_plus import PRESETS, FeatureCacheConfig, StepPlan, feature_cache, token_merging
from tomesd_plus.benchmark import SHAPES, build_unet, make_inputs
from tomesd_plus.benchmark.measure import stand_in
from tomesd_plus.evaluation.generation.devices import device_name
from tomesd_plus.host.clock import seconds_of
from tomesd_plus.tuning.plans import Costs, Plan

shape, size, rounds = sys.argv[1:] or ("tiny", "64", "2")
device = torch.device("cpu")
unet = build_unet(SHAPES[shape], torch.float32, device)
inputs = make_inputs(SHAPES[shape], int(size), 2, torch.float32, device)
sample = inputs.pop("sample")
KINDS = {  # what the letters of a pattern are, with merging as in a preset, by itself, or without
    "FCS": (None, {"F": "full", "C": "cached", "S": "skipped"}),
    "FC": ("preset", {"F": "full, merged as in presets", "C": "cached, merged as in presets"}),
    "F": ("alone", {"F": "merging alone, half of the tokens"}),
}
seconds: dict[str, list[float]] = defaultdict(list)
with ExitStack() as stack, torch.no_grad():
    runs = []
    for pattern, (merging, names) in KINDS.items():
        pipe = stand_in(unet)
        config = PRESETS["fast"].merging_for(pipe)
        assert config is not None
        if merging == "preset":
            stack.enter_context(token_merging(pipe, config))
        elif merging == "alone":
            stack.enter_context(token_merging(pipe, ratio=0.5, plan_per="block", max_downsample=config.max_downsample))
        if len(pattern) > 1:
            cache = FeatureCacheConfig(plan=StepPlan(pattern, repeats=True), forecast=0.85)
            stack.enter_context(feature_cache(pipe, cache))
        pipe.scheduler.set_timesteps(
            len(pattern) * (int(rounds) + 2)
        )  # the first round warms up, the last is not taken
        runs.append((pipe, pattern, names))
    for number in range(int(rounds) + 1):
        for pipe, pattern, names in runs if number % 2 else reversed(runs):
            for place, letter in enumerate(pattern):
                timestep = pipe.scheduler.timesteps[number * len(pattern) + place]
                taken = seconds_of(lambda: pipe.unet(sample, timestep, **inputs, return_dict=False), device)  # noqa: B023
                if number:
                    seconds[names[letter]].append(taken)

full = statistics.median(seconds["full"])
share = {name: statistics.median(times) / full for name, times in seconds.items()}
costs = Costs(
    share["cached"], share["skipped"], share["cached, merged as in presets"], share["full, merged as in presets"]
)
with Path(f"step-costs-{shape}.csv").open("w", newline="", encoding="utf-8") as file:
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["shape", "size", "device", "what", "ms", "least", "most", "share of a full step", "speed-up"])
    for name, times in seconds.items():
        figures = (f"{value * 1e3:.1f}" for value in (statistics.median(times), min(times), max(times)))
        table.writerow(
            [shape, size, device_name(device), name, *figures, f"{share[name]:.4f}", f"{1 / share[name]:.2f}"]
        )
    for name, chosen in PRESETS.items():
        assert chosen.cache is not None and isinstance(chosen.cache.plan, StepPlan)
        letters = "".join(chosen.cache.plan.at_number(step, step == 19) for step in range(20))
        cost = Plan(letters, merging="all" if chosen.merging else "none").cost(costs) / 20
        table.writerow([shape, size, "", f"preset {name}, 20 steps", "", "", "", f"{cost:.4f}", f"{1 / cost:.2f}"])
