"""Measure time and memory of configurations, interleaved with the baseline; and equal-time configurations."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from tomesd_plus.evaluation.configurations import BASELINE, Configuration, equal_time
from tomesd_plus.evaluation.experiment import Experiment
from tomesd_plus.evaluation.file_io import read_json, write_json
from tomesd_plus.evaluation.generation.devices import MEBIBYTE, device_name, peak_memory
from tomesd_plus.evaluation.generation.sampling import Sampling, run_batch
from tomesd_plus.evaluation.items import Item
from tomesd_plus.evaluation.speed import SPEED_FILE, Speed, load_speeds, manifest_digest


def measured_speeds(
    pipe: Any,
    experiment: Experiment,
    configurations: Sequence[Configuration],
    sampling: Sampling,
    runs: int = 5,
    batch_size: int = 1,
    on_run: Callable[[int], None] | None = None,
) -> dict[str, Speed]:
    """Measure the speeds that ``speed.json`` lacks, each configuration interleaved with the baseline.

    The file is written after each configuration, so an interrupted run loses at most one.

    Args:
        pipe, configurations, sampling, runs: As in :func:`measure_speeds`.
        experiment: With prepared folders; its first items are generated.
        batch_size: Images per batch.
        on_run: Called after each run with the total number of runs.

    Returns:
        All speeds, by folder name.
    """
    items = experiment.items[:batch_size]
    device = device_name(pipe.unet.device)
    known = {
        name: speed for name, speed in load_speeds(experiment, runs, len(items)).items() if speed.device == device
    }
    new = [configuration for configuration in configurations if configuration.folder not in known]
    pairs = [[BASELINE, configuration] for configuration in new if not configuration.is_baseline]
    pairs = pairs or [[configuration] for configuration in new]
    total = sum(map(len, pairs)) * (runs + 1)
    for pair in pairs:
        measured = measure_speeds(pipe, pair, items, sampling, runs, (lambda: on_run(total)) if on_run else None)
        for name, speed in measured.items():  # keeps the first measurement of the baseline
            known.setdefault(name, replace(speed, manifest=manifest_digest(experiment, name)))
        entries = read_json(experiment.out / SPEED_FILE) if (experiment.out / SPEED_FILE).exists() else {}
        entries |= {name: asdict(speed) for name, speed in known.items()}
        write_json(experiment.out / SPEED_FILE, entries)
    return load_speeds(experiment)


def equal_time_steps(steps: int, speedup: float, seconds: float, step_seconds: float) -> int:
    """The number of steps that the baseline can do in a faster configuration's time.

    Only the time of steps can be saved; encoding the prompt and decoding the image take the same time as before.

    Args:
        steps: Steps of the baseline.
        speedup: Speed-up of the configuration.
        seconds, step_seconds: The baseline's times per image and per step of one image.

    Example:
        >>> equal_time_steps(20, speedup=2.0, seconds=1.0, step_seconds=0.04)  # saves 0.5 s: 13 steps of 0.04 s
        7
    """
    saved = seconds - seconds / speedup
    return max(1, steps - math.ceil(round(saved / step_seconds, 6)))


def equal_time_rows(
    configurations: Sequence[Configuration], speeds: dict[str, Speed], sampling: Sampling
) -> list[Configuration]:
    """For each faster configuration, the baseline with the number of steps that fit in its time."""
    base = speeds.get(BASELINE.folder)
    if base is None:
        return []
    fewer = {
        equal_time_steps(
            sampling.steps, speeds[configuration.folder].speedup, base.seconds, base.step_seconds / base.batch_size
        )
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
    """Run all configurations in turn, so that changes in the machine's load affect all of them alike.

    A warm-up of each comes first. Switching a configuration on is not timed, nor are two steps after it, in which some
    methods set themselves up.

    Args:
        pipe: An unmodified text-to-image pipeline.
        configurations: The first one is the baseline.
        items: One batch, the same for every run.
        sampling: Steps, guidance and size.
        runs: Timed runs per configuration.
        on_run: Called after each run; there are ``runs + 1`` per configuration.
    """
    seconds: dict[str, list[float]] = {configuration.folder: [] for configuration in configurations}
    steps: dict[str, list[float]] = {configuration.folder: [] for configuration in configurations}
    memory: dict[str, float] = {}
    removed: dict[str, list[dict[str, Any]]] = {}
    for run in range(-1, runs):  # run −1 is the warm-up, in which memory is sampled: that would disturb the times
        for configuration in configurations:
            name = configuration.folder
            with configuration.switched_on(pipe) as report:
                if run < 0:
                    with peak_memory(pipe.unet.device) as peak:
                        run_batch(pipe, items, configuration, sampling)
                    memory[name] = peak[0] / MEBIBYTE
                    removed[name] = [asdict(step) for step in report.steps] if report else []
                else:
                    short = min(2, configuration.steps or sampling.steps)
                    run_batch(pipe, items, replace(configuration, steps=short), sampling)
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
