"""``tomesd-plus compare``: the same seeds with and without merging."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tomesd_plus.cli.common import check_writable, console, fail, load, progress_bar, run
from tomesd_plus.cli.names import PRESETS
from tomesd_plus.cli.options import (
    CacheInterval,
    Device,
    Dtype,
    Guidance,
    MaxDownsample,
    Model,
    MoreAt,
    Prompts,
    Ratios,
    ScheduleName,
    Scheduler,
    Seed,
    Size,
    Steps,
    merging_from,
    preset_from,
    prompts_from,
    sampling_from,
)
from tomesd_plus.evaluation.names import TINY
from tomesd_plus.schedules import Direction

if TYPE_CHECKING:
    from tomesd_plus.evaluation.generation.compare import Comparison

PICTURES = (".png", ".jpg", ".pdf", ".svg")


def compare_command(
    prompts: Prompts = None,
    model: Model = TINY,
    ratio: Ratios = None,
    schedule: ScheduleName = "cosine",
    more_at: MoreAt = Direction.noisy,
    max_downsample: MaxDownsample = 1,
    cache_interval: CacheInterval = None,
    preset: Annotated[
        list[str] | None, typer.Option(help=f"A preset: {', '.join(PRESETS)}, or a file; repeatable.")
    ] = None,
    steps: Steps = 25,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    seed: Seed = 0,
    size: Size = None,
    device: Device = None,
    dtype: Dtype = None,
    peers: Annotated[
        bool,
        typer.Option(
            help="Add rows: tomesd, the DeepCache package, skipped calls, Align Your Steps, fewer steps in equal "
            "time, another seed."
        ),
    ] = True,
    out: Annotated[Path, typer.Option(help="The image to write.")] = Path("compare.png"),
) -> None:
    """Compare the untouched pipeline with merging and caching on the same seeds: a table and an image."""
    chosen = prompts_from(prompts, model)
    sampling = sampling_from(steps, guidance, size, model)
    from tomesd_plus.evaluation.configurations import Configuration
    from tomesd_plus.evaluation.generation.compare import compare, peers_of
    from tomesd_plus.evaluation.reporting.comparison_plot import comparison_figure

    ratios = ratio or ([] if preset else [0.5])
    configurations = [preset_from(name) for name in preset or []]
    if cache_interval is not None:
        configurations.append(Configuration(f"cache {cache_interval}", {"cache": {"interval": cache_interval}}))
    configurations += [merging_from(value, schedule, more_at, max_downsample, cache_interval) for value in ratios]
    check_writable(out.parent)
    if out.is_dir() or out.suffix.lower() not in PICTURES:
        fail(f"--out must name a picture ({', '.join(PICTURES)}), not {str(out)!r}")
    pipe, where = load(model, device, dtype, scheduler=scheduler)
    settings = configurations + (peers_of(pipe, steps, ratios, max_downsample, cache_interval) if peers else [])
    with progress_bar() as progress:
        total = (1 + len(settings)) * (len(chosen) * steps + min(2, steps))
        task = progress.add_task("", total=total)

        def on_step(name: str) -> None:
            progress.update(task, advance=1, description=name)
            if progress.finished and peers:
                progress.update(task, total=None)  # the equal-time rows' number is not known before

        result = run(lambda: compare(pipe, chosen, settings, sampling, seed, equal_time=peers, on_step=on_step))
    parts = [model, scheduler, f"{steps} steps", f"{schedule} schedule" if ratios else None, where]
    console.print(comparison_table(result, ", ".join(part for part in parts if part)))
    comparison_figure(result).savefig(out, dpi=150)
    console.print(f"Picture: {out}")


def comparison_table(comparison: "Comparison", title: str) -> Table:
    """The table that ``compare`` prints."""
    table = Table(
        title=title, caption="Medians of time, means of PSNR and SSIM to the untouched picture of the same seed."
    )
    for name in ("setting", "s / image", "ms / step", "speed-up", "PSNR dB", "SSIM", "tokens removed"):
        table.add_column(name, justify="left" if name in ("setting", "tokens removed") else "right")
    for row in (comparison.baseline, *comparison.rows):
        levels = ", ".join(f"level {level}: {share:.0%}" for level, share in row.removed.items() if share)
        same = row is comparison.baseline
        table.add_row(
            row.name,
            f"{row.seconds:.2f}",
            f"{1000 * row.step_seconds:.0f}",
            f"{row.speedup:.2f}×",
            "" if same else f"{sum(row.psnr) / len(row.psnr):.1f}",
            "" if same else f"{sum(row.ssim) / len(row.ssim):.3f}",
            levels or ("none" if row.step_records else ""),
        )
    return table
