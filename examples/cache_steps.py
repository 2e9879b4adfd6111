"""Full and cached steps of our feature cache and of the DeepCache package, one step of each in turn.

``python examples/cache_steps.py SHAPE SIZE STEPS`` writes ``cache-steps.csv``; a tiny UNet, 64 pixels and 4 steps by
default. A step in turn meets the same noise of the machine, which whole runs, minutes apart, do not.
"""

import csv
import statistics
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import torch

from tomesd_plus.benchmark import SHAPES, build_unet, make_inputs
from tomesd_plus.benchmark.measure import stand_in
from tomesd_plus.evaluation.configurations import parse_configuration
from tomesd_plus.host.clock import now

shape, size, steps = sys.argv[1:] or ("tiny", "64", "4")
device = torch.device("cpu")
unet = build_unet(SHAPES[shape], torch.float32, device)
inputs = make_inputs(SHAPES[shape], int(size), 2, torch.float32, device)
sample = inputs.pop("sample")
peers = []
seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
with ExitStack() as stack, torch.no_grad():
    for peer, text in (("ours", "cache: 2"), ("DeepCache", "deepcache: 2")):
        pipe = stand_in(unet)
        stack.enter_context(parse_configuration(text).switched_on(pipe))
        pipe.scheduler.set_timesteps(int(steps) + 2)  # the first two warm up
        peers.append((peer, pipe))
    for step in range(int(steps) + 2):
        for peer, pipe in peers if step % 4 < 2 else reversed(peers):  # full and cached steps in both orders
            start = now(device)
            pipe.unet(sample, pipe.scheduler.timesteps[step], **inputs, return_dict=False)
            if step >= 2:  # of an interval of 2, every other step is full
                seconds["cached" if step % 2 else "full", peer].append(now(device) - start)

with Path("cache-steps.csv").open("w", newline="", encoding="utf-8") as file:
    table = csv.writer(file, lineterminator="\n")
    names = ["ours ms", "DeepCache ms", "DeepCache / ours", "lower quartile", "upper quartile", "pairs"]
    table.writerow(["step", *names])
    for kind in ("full", "cached"):
        ours, theirs = seconds[kind, "ours"], seconds[kind, "DeepCache"]
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        low, middle, high = statistics.quantiles(ratios, method="inclusive")
        times = [f"{statistics.median(times) * 1e3:.1f}" for times in (ours, theirs)]
        table.writerow([kind, *times, *(f"{ratio:.3f}" for ratio in (middle, low, high)), len(ours)])
