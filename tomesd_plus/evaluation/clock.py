"""The one clock that all measurements read."""

import time

import torch


def now(device: torch.device) -> float:
    """The time in seconds once the device has done all that it was given; of another device it says nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
