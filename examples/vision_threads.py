"""What merging saves in several threads, on a machine that others use too: vision_threads.py [SHAPE] [ROUNDS].

The benchmark's times in several threads are by the clock, which others disturb. These are what all threads together
have run; with OMP_WAIT_POLICY=passive that is work alone, not waiting for each other.
"""

import csv
import sys
import time
from contextlib import ExitStack
from statistics import median

import torch

from tomesd_plus.benchmark import TOWERS, merge_efficiency, tower_settings
from tomesd_plus.benchmark.towers import BATCH, TowerRunner, tower_runner
from tomesd_plus.evaluation.generation.devices import device_name

shape, rounds = (sys.argv[1] if len(sys.argv) > 1 else "vit-tiny"), int(sys.argv[2] if len(sys.argv) > 2 else 3)
CPU = torch.device("cpu")
settings = tower_settings(["merging"], [8, 13, 16, (8, -1)] if shape != "vit-tiny" else [4])
size = TOWERS[shape].image_size


def seconds(runner: TowerRunner) -> float:
    """What all threads have run in one call."""
    began = time.process_time()
    runner.model(runner.pictures)
    return time.process_time() - began


def write(times: list[list[float]]) -> None:
    """The table as it is by now."""
    share = {
        setting.key: median(own / base for own, base in zip(each, times[0], strict=True))
        for setting, each in zip(settings, times, strict=True)
    }
    with open("vision-threads.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["shape", "batch", "device", "setting", "r", "CPU seconds", "speed-up", "efficiency", "rounds"])
        for setting, each in zip(settings, times, strict=True):
            ideal = setting.ideal
            r = setting.key[1].removeprefix("r = ")
            efficiency = merge_efficiency(1, share[setting.key], share[ideal.key]) if ideal else None
            table.writerow([
                shape, BATCH, device_name(CPU), setting.name, r, f"{median(each):.4g}",
                f"{1 / share[setting.key]:.3f}", "" if efficiency is None else f"{efficiency:.3f}", len(each),
            ])  # fmt: skip


with ExitStack() as stack, torch.no_grad():
    model = TOWERS[shape].build(size, torch.float32, CPU)
    runners = [stack.enter_context(tower_runner(model, setting, size, BATCH, False)) for setting in settings]
    for runner in runners:
        seconds(runner)  # warm up
    times: list[list[float]] = [[] for _ in settings]
    for _ in range(rounds):
        for runner, own in zip(runners, times, strict=True):
            own.append(seconds(runner))
        write(times)
