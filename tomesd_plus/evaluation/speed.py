"""Time and memory of each configuration, interleaved with the baseline's."""

import platform
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch

from tomesd_plus.evaluation.configurations import BASELINE, Configuration, equal_time
from tomesd_plus.evaluation.experiment import Experiment
from tomesd_plus.evaluation.files import read_json, write_json
from tomesd_plus.evaluation.generate import Sampling
from tomesd_plus.evaluation.generation import run_batch
from tomesd_plus.evaluation.items import Item

FILE = "speed.json"
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Speed:
    """What a configuration costs.

    Args:
        seconds: Median time of an image: of a batch, divided by its size.
        step_seconds: Median time of a denoising step, of a whole batch.
        speedup: Median of the baseline's time divided by this one's, run one after the other.
        speedup_low, speedup_high: The least and the greatest of these.
        runs: How many.
        batch_size: Images at a time.
        memory_mib: Peak, MiB: what PyTorch allocated on a GPU, or the process's resident memory on a CPU.
        removed: At each step its noise level, and the share of tokens removed at each downsample.
        device: What it ran on.
    """

    seconds: float
    step_seconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    runs: int
    batch_size: int
    memory_mib: float
    removed: list[dict[str, Any]] = field(default_factory=list)
    device: str = ""


def measured_speeds(
    pipe: Any,
    experiment: Experiment,
    configurations: Sequence[Configuration],
    sampling: Sampling,
    runs: int = 5,
    batch_size: int = 1,
    on_run: Callable[[], None] | None = None,
) -> dict[str, Speed]:
    """Measure each configuration that ``speed.json`` lacks, and write that; returns all speeds, by folder."""
    known = load_speeds(experiment)
    new = [configuration for configuration in configurations if configuration.folder not in known]
    if new:
        items = list(experiment.items[:batch_size])
        chosen = [BASELINE, *(configuration for configuration in new if not configuration.is_baseline)]
        measured = measure_speeds(pipe, chosen, items, sampling, runs, on_run)
        known = {**measured, **known}  # the baseline's first figures stay
        write_json(experiment.out / FILE, {name: asdict(speed) for name, speed in known.items()})
    return load_speeds(experiment)


def load_speeds(experiment: Experiment) -> dict[str, Speed]:
    """What was measured so far, by the configurations' folders."""
    path = experiment.out / FILE
    return {name: Speed(**entry) for name, entry in read_json(path).items()} if path.exists() else {}


def equal_time_rows(
    configurations: Sequence[Configuration], speeds: dict[str, Speed], sampling: Sampling
) -> list[Configuration]:
    """For each configuration that is faster, the baseline with as many steps as fit in its time."""
    fewer = {
        max(1, round(sampling.steps / speeds[configuration.folder].speedup))
        for configuration in configurations
        if configuration.switches and configuration.folder in speeds
    }
    return [equal_time(steps) for steps in sorted(fewer, reverse=True) if steps < sampling.steps]


def measure_speeds(
    pipe: Any,
    configurations: Sequence[Configuration],
    items: Sequence[Item],
    sampling: Sampling,
    runs: int = 5,
    on_run: Callable[[], None] | None = None,
) -> dict[str, Speed]:
    """Run all configurations in turn, so that a machine's noise meets them alike; a warm-up of each goes before.

    Args:
        pipe: A text-to-image pipeline, untouched.
        configurations: The first is what the others are compared with.
        items: One batch, the same for every run.
        sampling: Steps, guidance and size.
        runs: How often each is timed.
        on_run: Called after each run; there are ``(runs + 1)`` a configuration.
    """
    seconds: dict[str, list[float]] = {configuration.folder: [] for configuration in configurations}
    steps: dict[str, list[float]] = {configuration.folder: [] for configuration in configurations}
    memory: dict[str, float] = {}
    removed: dict[str, list[dict[str, Any]]] = {}
    for run in range(-1, runs):  # the first is the warm-up; memory is watched in it, which would disturb the times
        for configuration in configurations:
            name = configuration.folder
            with configuration.switched_on(pipe) as report:
                if run < 0:
                    with _peak_memory(pipe) as peak:
                        run_batch(pipe, items, configuration, sampling)
                    memory[name] = peak[0] / MEBIBYTE
                    removed[name] = [asdict(step) for step in report.steps] if report else []
                else:
                    made = run_batch(pipe, items, configuration, sampling)
                    seconds[name].append(made.seconds / len(items))
                    steps[name].append(made.step_seconds)
            if on_run:
                on_run()
    baseline = seconds[configurations[0].folder]
    speeds = {}
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(baseline, times, strict=True)]
        speeds[name] = Speed(
            statistics.median(times), statistics.median(steps[name]), statistics.median(ratios), min(ratios),
            max(ratios), runs, len(items), memory[name], removed[name], device_name(pipe.unet.device),
        )  # fmt: skip
    return speeds


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the CPU's architecture and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type


@contextmanager
def _peak_memory(pipe: Any) -> Iterator[list[float]]:
    """The peak in bytes, as the one entry of a list, once the block is left."""
    peak = [0.0]
    device = pipe.unet.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = float(torch.cuda.max_memory_allocated(device))
        return
    process = psutil.Process()  # resident memory has no peak that can be reset, so it is sampled
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
