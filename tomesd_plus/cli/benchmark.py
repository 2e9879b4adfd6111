"""``tomesd-plus benchmark``: what merging costs and saves at the shapes of published UNets."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tomesd_plus.cli.common import check_writable, console, fail, progress_bar, quiet, run, say, usable
from tomesd_plus.cli.names import METHODS, PRESETS, SHAPES, SUITES, TOWERS
from tomesd_plus.cli.options import Device, Dtype
from tomesd_plus.cli.report import MIN_WIDTH
from tomesd_plus.evaluation.errors import installed
from tomesd_plus.schedules import ConstantSchedule

if TYPE_CHECKING:
    from tomesd_plus.benchmark import Outcome, Suite

UNETS = {"ratio", "setting", "preset", "cache_interval", "levels"}
TOWERS_ONLY = {"r", "method"}
SINGLE = {"shape", "size", "batch", "dtype", "compiled"} | UNETS | TOWERS_ONLY
SETTINGS = ["attn1", "block", "keys and values", "tomesd"]
TRANSFORMER_SETTINGS = ["attn1", "attn1 + attn2 + mlp", "block", "run"]


def _check_ratios(ratios: list[float] | None) -> list[float] | None:
    try:
        return None if ratios is None else [ConstantSchedule(ratio).ratio for ratio in ratios]
    except ValueError as error:
        fail(str(error))


def benchmark_command(
    context: typer.Context,
    suite: Annotated[str | None, typer.Option(help=f"A complete published table: {', '.join(SUITES)}.")] = None,
    shape: Annotated[
        str,
        typer.Option(help=f"Shape of a UNet or transformer: {', '.join(SHAPES)}; or of a tower: {', '.join(TOWERS)}."),
    ] = "sd15",
    size: Annotated[
        list[int] | None, typer.Option(help="Side in pixels; repeatable. Default: the model's own.")
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Batch size, both guidance branches counted; repeatable. Default: 2; 8 for a tower."),
    ] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(callback=_check_ratios, help="Share of tokens to remove; repeatable.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="A name, or a configuration such as 'merge: {window: 4}'; repeatable. See above."),
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help=f"Short for --setting 'preset: NAME': {', '.join(PRESETS)}; repeatable.")
    ] = None,
    cache_interval: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Interval of the feature cache and of the DeepCache package; repeatable."),
    ] = None,
    r: Annotated[
        list[str] | None,
        typer.Option(help="Vision: tokens to remove in each layer, as 16, or as 8,-1 with an inflection; repeatable."),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"Vision: {', '.join(METHODS)}; repeatable.")] = None,
    levels: Annotated[int, typer.Option(min=1, max=4, help="Levels to merge at, from the finest.")] = 1,
    dtype: Dtype = None,
    device: Device = None,
    compiled: Annotated[bool, typer.Option("--compile", help="With unet.compile_repeated_blocks.")] = False,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Timed runs of each setting. Default: 5; 3 for a suite's long ones."),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=0, help="Images of the embedded pipeline for PSNR; 0: none. Default: 4.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after this many minutes; run again to continue.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write to. Default: results for a suite, else benchmark.")
    ] = None,
) -> None:
    """Time a UNet, transformer or vision tower of a published shape, with random weights, under settings in turn.

    Settings: attn1 (in sd3 and flux-blocks the joint attention); attn1, full every 4; attn1, gate; attn1 + attn2 +
    mlp; block; run (transformers only: all blocks, merged and unmerged once); block, plan every 4; block, whole
    every 4; keys and values; tomesd (our drop-in); tomesd package; cache, skip (whole calls) or DeepCache 2, 3, 4, 5
    or 7; attn1 + cache 2, 3 or 5; block + cache 3; preset quality, balanced or fast (a complete run of 25 steps);
    or a configuration as `evaluate` takes it. The untouched UNet is always included, and so is the ideal, fewer
    tokens at no cost, for the merge efficiency. Finished rows are not measured again.
    """
    given = {n for n in SINGLE if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"}
    if suite is not None:
        if given:
            fail(f"a suite has its own {', '.join(sorted(given))}: leave out --suite or these")
        if suite not in SUITES:
            fail(f"unknown suite {suite!r}: choose from {', '.join(SUITES)}")
    elif shape not in (*SHAPES, *TOWERS):
        fail(f"unknown shape {shape!r}: choose from {', '.join((*SHAPES, *TOWERS))}")
    elif foreign := given & (UNETS if shape in TOWERS else TOWERS_ONLY):
        kind, others = ("a vision tower", "UNets") if shape in TOWERS else ("a UNet", "vision towers")
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(foreign))
        fail(f"{shape} is {kind}: {options} are for {others}")
    quiet()
    from tomesd_plus import benchmark

    where = usable(device)
    if suite is not None:
        if suite == "gpu" and where.type == "cpu":
            fail("the suite 'gpu' needs a GPU: 'smoke' runs the same with a tiny UNet anywhere")
        chosen = benchmark.SUITES[suite]()
    dtype = dtype or ("float32" if where.type == "cpu" else "float16")
    if suite is None and shape in TOWERS:
        chosen = run(lambda: _tower(shape, size, batch, r, method, dtype, compiled))
    elif suite is None:
        names = [*(setting or []), *(f"preset: {name}" for name in preset or [])]
        caches = ("cache", "deepcache") if installed("DeepCache") else ("cache",)
        names += [f"{kind}: {count}" for count in cache_interval or [] for kind in caches]
        chosen = run(lambda: _single(shape, size, batch, ratio, names or _usual(shape), levels, dtype, compiled))
    chosen = replace(
        chosen,
        repeats=repeats or chosen.repeats,
        prompts=chosen.prompts if prompts is None else prompts,
        minutes=chosen.minutes if minutes is None else minutes,
    )
    out = out or Path("results" if suite else "benchmark")
    check_writable(out)
    with progress_bar("runs") as progress:
        bar = progress.add_task("", total=None)

        def on_progress(what: str, now: str) -> None:
            progress.update(bar, advance=1, description=escape(f"{what}: {now}"))

        outcome = run(lambda: benchmark.run_suite(chosen, where, out, suite or "benchmark", on_progress))
    _print(outcome)


def _usual(shape: str) -> list[str]:
    """The settings that are compared if none is named."""
    from tomesd_plus import benchmark

    return TRANSFORMER_SETTINGS if benchmark.SHAPES[shape].is_transformer else SETTINGS


def _single(
    shape: str,
    size: list[int] | None,
    batch: list[int] | None,
    ratio: list[float] | None,
    names: list[str],
    levels: int,
    dtype: str,
    compiled: bool,
) -> "Suite":
    """A suite of what the options name."""
    from tomesd_plus import benchmark

    sizes = size or [benchmark.SHAPES[shape].image_size]
    transformer = benchmark.SHAPES[shape].is_transformer
    multiple = 16 if transformer else 8
    if any(pixels < 16 or pixels % multiple for pixels in sizes):
        fail(f"sizes must be multiples of {multiple} and at least 16 pixels, not {', '.join(map(str, sizes))}")
    if min(batch or [2]) < 1:
        fail("a batch has at least one sample")
    ratios = ratio or [0.5]
    for each in benchmark.settings_from(names, ratios, levels):
        each.check()
    workloads = [
        benchmark.Workload(shape, pixels, count, dtype, compiled) for pixels in sizes for count in batch or [2]
    ]
    tasks = tuple(benchmark.task(workload, names, ratios, levels) for workload in workloads)
    return benchmark.Suite(tasks, prompts=0) if transformer else benchmark.Suite(tasks)


def _tower(
    shape: str,
    size: list[int] | None,
    batch: list[int] | None,
    rs: list[str] | None,
    methods: list[str] | None,
    dtype: str,
    compiled: bool,
) -> "Suite":
    """A suite of what the options name, for a vision tower."""
    from tomesd_plus import benchmark
    from tomesd_plus.benchmark.towers import BATCH

    tower = benchmark.TOWERS[shape]
    patch = tower.config["patch_size"]
    sizes = size or [tower.image_size]
    if any(pixels < 2 * patch or pixels % patch for pixels in sizes):
        fail(f"sizes must be multiples of {patch} and at least {2 * patch}, not {', '.join(map(str, sizes))}")
    if min(batch or [BATCH]) < 1:
        fail("a batch has at least one sample")
    settings = benchmark.tower_settings(methods or ["merging"], [_parsed_r(text) for text in rs or ["8", "16"]])
    if compiled:  # the compiler would remove what an ideal does not use
        settings = [each for each in settings if not each.name.startswith("ideal")]
    workloads = [
        benchmark.Workload(shape, pixels, count, dtype, compiled) for pixels in sizes for count in batch or [BATCH]
    ]
    return benchmark.Suite(tuple(benchmark.Task(each, tuple(settings)) for each in workloads), prompts=0)


def _parsed_r(text: str) -> int | tuple[int, float]:
    try:
        first, *inflection = text.split(",")
        return (int(first), float(*inflection)) if inflection else int(first)
    except (TypeError, ValueError):
        fail(f"r is a number, or a number and an inflection as 8,-1, not {text!r}")


def _print(outcome: "Outcome") -> None:
    grid = Table(caption="Random weights: cost depends on shapes, not on weights.", caption_justify="left")
    towers = any(row.is_tower for row in outcome.rows)
    last = "images / s" if towers else "PSNR dB"
    for name in ("workload", "setting", "ms / call" if towers else "ms / UNet step", "speed-up", "efficiency", last):
        grid.add_column(name, justify="left" if name in ("workload", "setting") else "right")
    workload = None
    for row in outcome.rows:
        first = f"{row.shape} {row.size}², batch {row.batch}, {row.dtype}, {row.mode}" * (row.workload != workload)
        workload = row.workload
        speedup = f"{float(row.speedup):.2f}×" if row.speedup else row.note[:40]
        values = first, row.label, row.step_ms, speedup, row.efficiency, row.images_per_second or row.psnr
        grid.add_row(*map(escape, values))
    Console(width=max(console.width, MIN_WIDTH)).print(grid)
    for reason in outcome.left_out:
        say(f"Left out. {reason}")
    if outcome.unfinished:
        say(f"Time is up: run it again for {'; '.join(outcome.unfinished)}.")
    if outcome.files:
        console.print("Written: " + escape(", ".join(map(str, outcome.files))), soft_wrap=True)
