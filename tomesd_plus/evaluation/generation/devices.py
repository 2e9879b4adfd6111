"""Devices and dtypes by name, and peak memory."""

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from tomesd_plus.evaluation.errors import EvaluationError, first_line
from tomesd_plus.evaluation.names import DTYPES

MEBIBYTE = 2**20


def local_device(device: str | None = None) -> str:
    """Choose the given device or the best available; in a launched process ``cuda`` is the GPU of its local rank."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def usable_device(device: str | None = None) -> torch.device:
    """The :func:`local_device`, if a tensor can be made there; else an EvaluationError that says why not."""
    device = local_device(device)
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # another class for each way it cannot
        raise EvaluationError(f"device {device!r} cannot be used: {first_line(error)}") from error


def dtype_by_name(name: str | None, device: torch.device) -> torch.dtype:
    """A dtype of :data:`~tomesd_plus.evaluation.names.DTYPES`; by default float32 on a CPU, else float16."""
    name = name or ("float32" if device.type == "cpu" else "float16")
    if name not in DTYPES:
        raise EvaluationError(f"unknown dtype {name!r}: choose from {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def device_name(device: torch.device) -> str:
    """The name of the accelerator, or the CPU's architecture and PyTorch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Measure peak memory in bytes inside a ``with`` block; afterwards it is the only entry of the yielded list."""
    peak = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = float(torch.cuda.max_memory_allocated(device))
        return
    process = psutil.Process()  # the peak of resident memory cannot be reset, so sample the memory instead
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], process.memory_info().rss)
