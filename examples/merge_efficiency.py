"""How much of what merging can save is saved, seen closely: the time of the transformer blocks that it changes.

``python examples/merge_efficiency.py SHAPE SIZE RATIOS ROUNDS`` writes ``merge-efficiency.csv``; a tiny UNet, 64
pixels, 0.1,0.5 and 2 rounds by default, which is the least. In a whole UNet call the blocks of the finest level are a
part only, and a noisy machine's differences in the rest hide what merging takes. So the calls are whole ones, of every
setting in turn, but what is timed is these blocks, with matching, merging and unmerging, and what is done before the
model begins. Efficiency and speed-up are the median and quartiles of those within a round.
"""

import csv
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from tomesd_plus.benchmark import SHAPES, build_unet, make_inputs, merge_efficiency
from tomesd_plus.benchmark.measure import stand_in
from tomesd_plus.benchmark.settings import PACKAGE, UNTOUCHED, settings_from, with_ideals
from tomesd_plus.benchmark.shapes import LATENT_PIXELS
from tomesd_plus.host.clock import Moment, moment, seconds_between

shape, size, ratios, rounds = sys.argv[1:] or ("tiny", "64", "0.1,0.5", "2")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.float16 if device.type == "cuda" else torch.float32
finest = SHAPES[shape].finest
latent = int(size) // LATENT_PIXELS
tokens = (latent // finest) ** 2


class Clock:
    """Times a UNet's blocks at the finest level, and what other hooks do before its call."""

    def __init__(self) -> None:
        self.spans: list[tuple[Moment, Moment]] = []

    def start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._start = moment(device)

    def stop(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.spans.append((self._start, moment(device)))

    def stop_block(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.shape[1] == tokens:
            self.spans.append((self._start, moment(device)))

    def watch(self, unet: nn.Module) -> None:
        """Begin before all other hooks and end after them: call it once they are there."""
        unet.register_forward_pre_hook(self.start, with_kwargs=True, prepend=True)
        unet.register_forward_pre_hook(self.stop, with_kwargs=True)
        for module in unet.modules():
            if isinstance(module, BasicTransformerBlock):
                module.register_forward_pre_hook(self.start, with_kwargs=True, prepend=True)
                module.register_forward_hook(self.stop_block)


unet = build_unet(SHAPES[shape], dtype, device)
inputs = make_inputs(SHAPES[shape], int(size), 2, dtype, device)
sample = inputs.pop("sample")
compared = settings_from(["attn1", PACKAGE, "attn1 + attn2 + mlp"], [float(ratio) for ratio in ratios.split(",")])
settings = {setting.key: setting for setting in with_ideals(compared)}
clocks = {key: Clock() for key in settings}
seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in settings}
with ExitStack() as stack, torch.no_grad():
    pipes = {}
    for key, setting in settings.items():
        pipes[key] = pipe = stand_in(unet)
        stack.enter_context(setting.switched_on(pipe, finest, (latent, latent)))
        clocks[key].watch(pipe.unet)
        pipe.scheduler.set_timesteps(int(rounds) + 1)
    for step in range(int(rounds) + 1):
        for key, pipe in pipes.items():
            clocks[key].spans.clear()
            pipe.unet(sample, pipe.scheduler.timesteps[step], **inputs, return_dict=False)
            if step:  # the first warms up
                seconds[key].append(sum(seconds_between(*span) for span in clocks[key].spans))


def spread(figures: list[float]) -> list[str]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(figures, method="inclusive")
    return [f"{figure:.3f}" for figure in (middle, low, high)]


quartiles = ["lower quartile", "upper quartile"]
with Path("merge-efficiency.csv").open("w", newline="", encoding="utf-8") as file:
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["setting", "ratio", "blocks ms", "speed-up", *quartiles, "efficiency", *quartiles, "rounds"])
    whole = seconds[UNTOUCHED.key]
    for key, setting in settings.items():
        name, ratio, _ = key
        speedups = spread([base / own for base, own in zip(whole, seconds[key], strict=True)])
        efficiency = [""] * 3
        if setting.ideal is not None:
            each = zip(whole, seconds[key], seconds[setting.ideal.key], strict=True)
            found = [share for times in each if (share := merge_efficiency(*times)) is not None]
            efficiency = spread(found) if len(found) > 1 else efficiency
        table.writerow([name, ratio, f"{1000 * statistics.median(seconds[key]):.1f}", *speedups, *efficiency, rounds])
