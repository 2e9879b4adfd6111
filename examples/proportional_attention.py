"""Proportional attention's two forms, timed: a mask of log sizes, and the extra channel of the heads that replaces it.

Queries, keys and values of SD 1.5's first level at 512 × 512, half of whose 4,096 tokens are merged. Writes
``proportional-attention.csv``. ``python examples/proportional_attention.py RUNS``; three by default.
"""

import csv
import statistics
import sys
from pathlib import Path

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from tomesd_plus.host.attention import attention
from tomesd_plus.host.clock import moment, seconds_between

BATCH, TOKENS, CHANNELS, HEADS = 2, 2048, 320, 8
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.float16 if device.type == "cuda" else torch.float32
runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3

layer = Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS).to(device, dtype)
x = torch.randn(BATCH, TOKENS, CHANNELS, device=device, dtype=dtype)
sizes = torch.ones(BATCH, TOKENS, device=device, dtype=dtype)
sizes[:, ::2] = 3  # as many as a ratio of one half leaves
host = AttnProcessor2_0()
ways = {
    "no weights": lambda: attention(layer, x),
    "extra channel": lambda: attention(layer, x, sizes=sizes),
    "mask": lambda: host(layer, x, attention_mask=sizes.log()[:, None]),
}


def seconds(way: str) -> float:
    """Of one call."""
    start = moment(device)
    ways[way]()
    return seconds_between(start, moment(device))


with torch.no_grad():
    for way in ways:
        seconds(way)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(runs):
        for way in ways:
            times[way].append(seconds(way))
with Path("proportional-attention.csv").open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["device", "dtype", "torch", "way", "median ms", "least", "greatest", "runs"])
    for way, own in times.items():
        figures = [f"{1000 * value:.2f}" for value in (statistics.median(own), min(own), max(own))]
        writer.writerow([device.type, str(dtype).removeprefix("torch."), torch.__version__, way, *figures, runs])
