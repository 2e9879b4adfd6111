"""The workloads and settings of the benchmarks that ``results/`` publishes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tomesd_plus.benchmark.measure import MIN_ROUNDS, Workload
from tomesd_plus.benchmark.settings import (
    FEW_INTERVALS,
    INTERVALS,
    PACKAGE,
    UNTOUCHED,
    Setting,
    settings_from,
    with_ideals,
)
from tomesd_plus.benchmark.towers import TOWERS, tower_settings
from tomesd_plus.presets import PRESETS

FIRST = ["attn1", "attn1 + attn2 + mlp", "block", PACKAGE]
MORE = ["block, full every 4", "keys and values"]
PRESET_NAMES = [f"preset {name}" for name in PRESETS]


@dataclass(frozen=True)
class Task:
    """A workload and the settings to compare on it.

    Args:
        workload: The UNet and its input.
        settings: The settings to compare, including the untouched UNet and the ideals.
        repeats: Maximum number of rounds; ``None`` for the suite's.
    """

    workload: Workload
    settings: tuple[Setting, ...]
    repeats: int | None = None


@dataclass(frozen=True)
class Suite:
    """The tasks of one published table.

    Args:
        tasks: The tasks, the most important first.
        repeats, run_seconds: See :class:`~tomesd_plus.benchmark.measure.Protocol`.
        prompts, steps: Number of prompts and denoising steps for PSNR.
        minutes: Time limit.
    """

    tasks: tuple[Task, ...]
    repeats: int = 5
    run_seconds: float = 0.2
    prompts: int = 4
    steps: int = 25
    minutes: float | None = None


def task(
    workload: Workload,
    names: Sequence[str],
    ratios: Sequence[float] = (0.5,),
    levels: int = 1,
    repeats: int | None = None,
) -> Task:
    """Make a task from names of settings; see :func:`~tomesd_plus.benchmark.settings.settings_from`.

    Compiled workloads have no ideals: the compiler would remove layers whose output is not used.
    """
    settings = settings_from(names, ratios, levels)
    return Task(workload, (UNTOUCHED, *settings) if workload.compiled else tuple(with_ideals(settings)), repeats)


def cpu_suite() -> Suite:
    """SD 1.5's shape in float32: about five hours and 8 GB on two cores.

    A saving of a tenth needs many rounds on a noisy machine; long runs have three rounds.
    """
    at = {size: Workload("sd15", size) for size in (256, 512, 768, 1024)}
    long = MIN_ROUNDS
    presets = settings_from(PRESET_NAMES, [])
    presets += settings_from(["cached steps merged + cache 5", "all steps merged + cache 5"], [0.75])
    both = [f"attn1 + cache {interval}" for interval in FEW_INTERVALS]
    details = settings_from(["attn1, full every 4", "attention cache 4"], [0.5])
    details += settings_from(["attn1, plan per block"], [0.36, 0.5])  # 0.36: the average ratio with full steps
    return Suite(
        (
            task(at[512], FIRST),
            task(at[512], ["attn1", "block", PACKAGE], [0.25, 0.75], repeats=long),
            task(at[512], [*MORE, "tomesd"], repeats=long),
            Task(at[512], tuple(with_ideals(presets)), long),
            task(
                at[512],
                [*_caches(INTERVALS), *both],
                [0.25, 0.5, 0.75],
                repeats=long,
            ),
            Task(at[512], tuple(with_ideals(details)), long),
            task(at[512], ["attn1, gate"], [0.1, 0.5], repeats=5),
            task(at[256], ["attn1", "attn1, gate", "block", PACKAGE], [0.1, 0.5]),
            task(at[1024], ["attn1", "block", PACKAGE], repeats=long),
            task(at[768], ["attn1", "block", PACKAGE], repeats=long),
            task(at[1024], ["block"], levels=2, repeats=long),
        ),
        repeats=12,
    )


def gpu_suite() -> Suite:
    """The shapes of SD 1.5, SD 2.1 and SDXL in float16, eager and compiled: at most ten minutes on one H200."""
    main = [*FIRST, *MORE, *_caches(FEW_INTERVALS), "block + cache 3", *PRESET_NAMES]
    few = ["attn1", "block", "keys and values", PACKAGE]

    def at(shape: str, size: int, batch: int = 2, compiled: bool = False) -> Workload:
        return Workload(shape, size, batch, "float16", compiled)

    return Suite(
        (
            task(at("sd15", 512), [*main, "attn1, gate"]),
            task(at("sd15", 1024), [*main, "tomesd", "block, plan every 4"]),
            task(at("sd15", 2048), main),
            task(at("sdxl", 1024), [*few, "cache 3"]),
            task(at("sdxl", 2048), [*few, "cache 3"]),
            task(at("sd15", 512, 8), few),
            task(at("sd15", 1024, 8), few),
            task(at("sd15", 2048, 8), few),
            task(at("sd15", 512), ["attn1, gate"], [0.1]),
            task(at("sdxl", 1024), ["attn1, gate"], [0.1, 0.5]),
            task(at("sd15", 768), few),
            task(at("sd15", 1536), few),
            task(at("sd15", 1024), ["attn1", "block", PACKAGE], [0.25, 0.75]),
            task(at("sd15", 2048), ["block", "keys and values"], levels=2),
            task(Workload("sd15", 1024, 2, "bfloat16"), ["attn1", "block"]),
            task(at("sd15", 1024, compiled=True), ["attn1", "block", PACKAGE]),
            task(at("sd15", 2048, compiled=True), ["attn1", "block", PACKAGE]),
            task(at("sd15", 512, compiled=True), ["attn1", "block", PACKAGE]),
            task(at("sdxl", 1024, compiled=True), ["block", PACKAGE]),
            task(at("sd21", 768), few),
        ),
        minutes=10,
    )


def vision_suite() -> Suite:
    """The shapes of published vision towers in float32: about half an hour on an idle core."""

    def at(shape: str, batch: int, methods: Sequence[str], rs: Sequence[Any]) -> Task:
        workload = Workload(shape, TOWERS[shape].image_size, batch)
        return Task(workload, tuple(tower_settings(methods, rs)))

    return Suite(
        (
            at("vit-b16", 8, ["merging"], [8, 13, 16, (8, -1)]),
            at("vit-b16", 8, ["merging", "evit", "ats"], [16]),
            at("clip-b32", 8, ["merging"], [2, 3]),
            at("dinov2-s", 2, ["merging"], [40, 80]),
            at("vit-l16", 2, ["merging"], [7, 8]),
            at("clip-l14", 2, ["merging"], [6, 9]),
        ),
        prompts=0,
    )


def smoke_suite() -> Suite:
    """The GPU suite with a tiny UNet, small images and two steps, on any device: a test that everything runs."""
    return Suite(tuple(map(_small, gpu_suite().tasks)), repeats=1, run_seconds=0, prompts=1, steps=2)


def _caches(intervals: Sequence[int]) -> list[str]:
    return [f"{kind} {interval}" for interval in intervals for kind in ("cache", "skip", "DeepCache")]


def _small(each: Task) -> Task:
    dtype = "float32" if each.workload.dtype == "float32" else "bfloat16"  # which CPUs support too
    return replace(each, workload=replace(each.workload, shape="tiny", size=each.workload.size // 16, dtype=dtype))


SUITES = {"cpu": cpu_suite, "gpu": gpu_suite, "vision": vision_suite, "smoke": smoke_suite}
