"""What merging takes and saves in single blocks of transformers, by the processor's time.

``python examples/transformer_blocks.py SHAPE SIZE RATIO ROUNDS`` adds to ``transformer-blocks.csv``; shape ``pixart``,
64 pixels, 0.5 and 2 rounds by default. A whole call of such a model takes minutes on a CPU, and others at work on the
machine disturb it. So here are models of one block (of Flux one of each kind, which ``run`` merges as one) with one
picture, and what is timed is the block, with matching, merging and unmerging, in one thread's own time. The settings
run in turn; speed-up and efficiency are the median and quartiles of those within a round. Each of these models has to
match for itself: models of many blocks, which share plans, do better.
"""

import csv
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from tomesd_plus import __version__
from tomesd_plus.benchmark import SHAPES, build_unet, make_inputs, merge_efficiency, settings_from, with_ideals
from tomesd_plus.benchmark.measure import stand_in
from tomesd_plus.benchmark.settings import UNTOUCHED
from tomesd_plus.benchmark.shapes import call_model
from tomesd_plus.evaluation.generation.devices import device_name
from tomesd_plus.host.transformers import blocks_of

name, size, ratio, rounds = sys.argv[1:] or ("pixart", "64", "0.5", "2")
torch.set_num_threads(1)
few = {"num_layers": 2 if name == "sd3" else 1}  # the last block of Stable Diffusion 3 is smaller
shape = replace(SHAPES[name], config=SHAPES[name].config | few | ({"num_single_layers": 1} if "flux" in name else {}))
model = build_unet(shape)
if name == "sd3":
    model.transformer_blocks = model.transformer_blocks[:1]
inputs = make_inputs(shape, int(size), 1, torch.float32, "cpu")


class Clock:
    """Times what lies between a model's first block's beginning and its last one's end."""

    def watch(self, model: nn.Module) -> None:
        """Begin before all other hooks and end after them: call it once they are there."""
        blocks = list(blocks_of(model).values())
        blocks[0].register_forward_pre_hook(self.start, with_kwargs=True, prepend=True)
        blocks[-1].register_forward_hook(self.stop)

    def start(self, *_: Any) -> None:
        self.began = time.thread_time()

    def stop(self, *_: Any) -> None:
        self.seconds = time.thread_time() - self.began


names = ["attn1", "attn1 + attn2 + mlp", "block", *(["run"] if "flux" in name else [])]
settings = {setting.key: setting for setting in with_ideals(settings_from(names, [float(ratio)]))}
seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in settings}
with ExitStack() as stack, torch.no_grad():
    pipes, clocks = {}, {}
    for key, setting in settings.items():
        pipes[key], clocks[key] = stand_in(model), Clock()
        stack.enter_context(setting.switched_on(pipes[key], latent_size=shape.grid(int(size))))
        clocks[key].watch(pipes[key].transformer)
        pipes[key].scheduler.set_timesteps(int(rounds) + 1)
    for step in range(int(rounds) + 1):
        for key, pipe in pipes.items():
            call_model(pipe.transformer, shape, inputs, pipe.scheduler.timesteps[step])
            if step:  # the first warms up
                seconds[key].append(clocks[key].seconds)


def spread(figures: list[float]) -> list[str]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(figures, method="inclusive")
    return [f"{figure:.3f}" for figure in (middle, low, high)]


quartiles = ["lower quartile", "upper quartile"]
head = ["shape", "image tokens", "setting", "ratio", "ms", "speed-up", *quartiles, "efficiency", *quartiles, "rounds"]
about = [device_name(torch.device("cpu")), __version__, torch.__version__, diffusers.__version__]
about += [datetime.now(UTC).date().isoformat()]
path = Path("transformer-blocks.csv")
new = not path.exists()
with path.open("a", newline="", encoding="utf-8") as file:
    table = csv.writer(file, lineterminator="\n")
    if new:
        table.writerow([*head, "device", "tomesd_plus", "torch", "diffusers", "date"])
    whole = seconds[UNTOUCHED.key]
    rows, columns = shape.grid(int(size))
    for key, setting in settings.items():
        speedups = spread([base / own for base, own in zip(whole, seconds[key], strict=True)])
        efficiency = [""] * 3
        if setting.ideal is not None:
            each = zip(whole, seconds[key], seconds[setting.ideal.key], strict=True)
            found = [share for times in each if (share := merge_efficiency(*times)) is not None]
            efficiency = spread(found) if len(found) > 1 else efficiency
        took = f"{1000 * statistics.median(seconds[key]):.1f}"
        table.writerow([name, rows * columns, key[0], key[1], took, *speedups, *efficiency, rounds, *about])
