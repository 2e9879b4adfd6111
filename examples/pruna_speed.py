"""Pruna's deepcache, this package's algorithms, and both together: speed, and PSNR to the untouched pictures.

``python -m examples.pruna_speed CAPTIONS ROUNDS STEPS`` writes ``pruna.csv``; 2 captions, 2 rounds and 20 steps by
default. The embedded pipeline makes held-out captions' pictures (from 300 on; the seed is the caption's number) with
DPM++ 2M and a guidance scale of 3, in one thread. In each round every setting makes one picture, one after the other.
A time is what the thread has run, which other work on the machine disturbs little; a speed-up is that of a whole call,
text encoder and decoder with it, against the untouched pipeline's in the same round.
"""

# isort: off
import examples.pruna_torchvision  # noqa: F401  # before all that asks for torchvision

# isort: on
import copy
import csv
import statistics
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from pruna import SmashConfig, smash

import tomesd_plus.integrations.pruna  # noqa: F401
from tomesd_plus import load_tiny_pipeline
from tomesd_plus.evaluation.generation.devices import device_name
from tomesd_plus.tiny import held_out_captions

captions, rounds, steps = map(int, (*sys.argv[1:], *("2", "2", "20")[len(sys.argv) - 1 :]))
FIRST = 300
SETTINGS: dict[str, dict[str, Any]] = {
    "untouched": {},
    "deepcache 2": {"deepcache": {"interval": 2}},
    "deepcache 3": {"deepcache": {"interval": 3}},
    "deepcache 2 + tome_sd": {"deepcache": {"interval": 2}, "tome_sd": {}},
    "deepcache 3 + tome_sd": {"deepcache": {"interval": 3}, "tome_sd": {}},
    "tome_sd": {"tome_sd": {}},
    "tome_cache 2": {"tome_cache": {"interval": 2, "forecast": 1.0}},
    "tome_cache 3": {"tome_cache": {"interval": 3}},
    "tome_cache 2 + tome_sd": {"tome_cache": {"interval": 2, "forecast": 1.0}, "tome_sd": {}},
    "tome_cache 2, calls": {"tome_cache": {"interval": 2, "skip": "calls"}},
    "tome_cache quality": {"tome_cache": {"preset": "quality"}},
    "tome_cache balanced": {"tome_cache": {"preset": "balanced"}},
    "tome_cache fast": {"tome_cache": {"preset": "fast"}},
}


def picture(pipe: Any, number: int) -> np.ndarray:
    """A held-out caption's picture, (height, width, 3) in [0, 1]."""
    call = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "np"}
    return pipe(held_out_captions()[number], generator=torch.Generator().manual_seed(number), **call).images[0]


torch.set_num_threads(1)
plain = load_tiny_pipeline()
plain.scheduler = DPMSolverMultistepScheduler.from_config(plain.scheduler.config)
plain.set_progress_bar_config(disable=True)
pipes = {name: smash(copy.deepcopy(plain), SmashConfig(each, device="cpu")) for name, each in SETTINGS.items()}
numbers = range(FIRST, FIRST + captions)
pictures = {name: [picture(pipe, number) for number in numbers] for name, pipe in pipes.items()}  # the warm-up too
times: dict[str, list[float]] = {name: [] for name in pipes}
for _ in range(rounds):
    for name, pipe in pipes.items():
        start = time.thread_time()
        picture(pipe, FIRST)
        times[name].append(time.thread_time() - start)

about = [version(name) for name in ("tomesd-plus", "pruna", "DeepCache", "torch", "diffusers")]
about += [device_name(torch.device("cpu")), datetime.now(UTC).date().isoformat()]
with Path("pruna.csv").open("w", newline="", encoding="utf-8") as file:
    table = csv.writer(file, lineterminator="\n")
    columns = [
        "setting",
        "seconds",
        "speed-up",
        "least",
        "greatest",
        "PSNR dB",
        "lowest",
        "highest",
        "captions",
        "steps",
    ]
    table.writerow([*columns, "rounds", "tomesd_plus", "pruna", "DeepCache", "torch", "diffusers", "device", "date"])
    for name in SETTINGS:
        speedups = [untouched / own for untouched, own in zip(times["untouched"], times[name], strict=True)]
        figures = [f"{value:.2f}" for value in (statistics.median(speedups), min(speedups), max(speedups))]
        squares = [float(((a - b) ** 2).mean()) for a, b in zip(pictures[name], pictures["untouched"], strict=True)]
        decibels = [-10 * np.log10(square) for square in squares if square]
        spread = [f"{each(decibels):.1f}" for each in (statistics.fmean, min, max)] if decibels else [""] * 3
        row = [name, f"{statistics.median(times[name]):.3f}", *figures, *spread, captions, steps, rounds]
        table.writerow([*row, *about])
