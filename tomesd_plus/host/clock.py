"""Time on a device."""

import time

import torch

Moment = torch.cuda.Event | float


def now(device: torch.device) -> float:
    """The time in seconds once the device has done all that it was given; of another device it says nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


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
