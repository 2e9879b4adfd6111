"""Time on a device."""

import time
from collections.abc import Callable

import torch

Moment = torch.cuda.Event | float


def now(device: torch.device) -> float:
    """The time in seconds once the device has done all that it was given; of another device it says nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The time that a function's work on a device takes.

    In one thread of a CPU it is the time that the thread has run, which other processes do not disturb.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        began = time.thread_time()
        work()
        return time.thread_time() - began
    start = moment(device)
    work()
    return seconds_between(start, moment(device))


def moment(device: torch.device) -> Moment:
    """A moment in the work that a device is given: on CUDA an event in the current stream, which waits for nothing."""
    if device.type != "cuda":
        return now(device)
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """The time between two moments of one device's work; waits until it has come so far."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
