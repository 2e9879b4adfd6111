"""The ``tomesd-plus`` command."""

import os
import re
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import diffusers
import torch
import transformers
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tomesd_plus import __version__
from tomesd_plus.config import ToMeConfig
from tomesd_plus.evaluation import (
    Comparison,
    ModelError,
    Sampling,
    Setting,
    compare,
    comparison_figure,
    generate,
    load_model,
    peer_settings,
)
from tomesd_plus.evaluation.models import TINY
from tomesd_plus.pipeline import apply_token_merging
from tomesd_plus.schedule import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule, StepsSchedule

PROMPTS = [
    "a large dog on a blue background",
    "a small strawberry on the left of a yellow striped background",
    "a large ladybug on a pink gradient background",
    "a small star and a small red heart on a purple background",
]
PICTURES = (".png", ".jpg", ".pdf", ".svg")
SPREAD = 0.4  # between the noisy and the clean end of a schedule, where its mean leaves room for it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULES: dict[str, Schedule] = {
    "constant": ConstantSchedule(0.5),
    "linear": LinearSchedule(0.5 + SPREAD / 2, 0.5 - SPREAD / 2),
    "cosine": CosineSchedule(0.5 + SPREAD / 2, 0.5 - SPREAD / 2),
    "steps": StepsSchedule((0.5 + SPREAD / 2, 0.5, 0.5 - SPREAD / 2)),
}


class Direction(StrEnum):
    """At which end of the noise levels a schedule merges more."""

    noisy = "noisy"
    clean = "clean"


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

Prompts = Annotated[list[str] | None, typer.Argument(help="One prompt or several.", show_default=False)]
Model = Annotated[str, typer.Option(help="'tiny' (embedded), a hub id, a folder, or a .safetensors checkpoint.")]
ScheduleName = Annotated[str, typer.Option("--schedule", help=f"Ratio over steps: {', '.join(SCHEDULES)}.")]
MoreAt = Annotated[Direction, typer.Option(help="Merge more at noisy steps or at clean ones.")]
MaxDownsample = Annotated[int, typer.Option(help="Merge at levels of at most this downsample: 1, 2, 4, 8; SDXL: 2.")]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")]
Guidance = Annotated[float, typer.Option(min=0, help="Guidance scale; 1 switches it off.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the first prompt; the next have the next.")]
Size = Annotated[str | None, typer.Option(help="Pixels: 512, or WIDTHxHEIGHT. Default: the model's own.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps … Default: the best there is.")]
Dtype = Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}. Default: float16 on a GPU, else float32.")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Faster Stable Diffusion by merging redundant tokens."""
    if version:
        console.print(f"tomesd-plus {__version__}")
        raise typer.Exit()


@app.command("compare")
def compare_command(
    prompts: Prompts = None,
    model: Model = TINY,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Mean ratio in [0, 1); may be repeated. Default: 0.5")
    ] = None,
    schedule: ScheduleName = "cosine",
    more_at: MoreAt = Direction.noisy,
    max_downsample: MaxDownsample = 1,
    steps: Steps = 25,
    guidance: Guidance = 5.0,
    seed: Seed = 0,
    size: Size = None,
    device: Device = None,
    dtype: Dtype = None,
    peers: Annotated[
        bool, typer.Option(help="Add rows: tomesd's way, fewer steps in equal time, another seed.")
    ] = True,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("compare.png"),
) -> None:
    """Compare the untouched pipeline with merging on the same seeds: a table, and a picture."""
    ratios = ratio or [0.5]
    configs = [_config(schedule, value, more_at, max_downsample) for value in ratios]
    sampling = _sampling(steps, guidance, size)
    chosen = _prompts(prompts, model)
    _check_writable(out.parent)
    if out.is_dir() or out.suffix.lower() not in PICTURES:
        _fail(f"--out must name a picture ({', '.join(PICTURES)}), not {str(out)!r}")
    pipe, where = _load(model, device, dtype)
    settings = [Setting.merging(f"ratio {value:g}", config) for value, config in zip(ratios, configs, strict=True)]
    if peers:
        settings += peer_settings(ratios, max_downsample)
    with _progress() as progress:
        total = (1 + len(settings)) * (len(chosen) * steps + min(2, steps))
        task = progress.add_task("", total=total)

        def on_step(name: str) -> None:
            progress.update(task, advance=1, description=name)
            if progress.finished and peers:
                progress.update(task, total=None)  # the equal-time rows' number is not known before

        result = _run(lambda: compare(pipe, chosen, settings, sampling, seed, equal_time=peers, on_step=on_step))
    console.print(comparison_table(result, f"{model}, {steps} steps, {schedule} schedule, {where}"))
    comparison_figure(result).savefig(out, dpi=150)
    console.print(f"Picture: {out}")


@app.command("generate")
def generate_command(
    prompts: Prompts = None,
    model: Model = TINY,
    ratio: Annotated[float, typer.Option(help="Mean ratio in [0, 1); 0 leaves the pipeline untouched.")] = 0.5,
    schedule: ScheduleName = "cosine",
    more_at: MoreAt = Direction.noisy,
    max_downsample: MaxDownsample = 1,
    steps: Steps = 25,
    guidance: Guidance = 5.0,
    seed: Seed = 0,
    size: Size = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("images"),
) -> None:
    """Generate a picture for each prompt, with or without merging."""
    config = _config(schedule, ratio, more_at, max_downsample)
    sampling = _sampling(steps, guidance, size)
    chosen = _prompts(prompts, model)
    _check_writable(out)
    pipe, where = _load(model, device, dtype)
    if ratio > 0:
        apply_token_merging(pipe, config)
    with _progress() as progress:
        task = progress.add_task(where, total=len(chosen) * steps)
        for index, prompt in enumerate(chosen):

            def run(prompt: str = prompt, seed: int = seed + index) -> Any:
                return generate(pipe, prompt, seed, sampling, lambda step: progress.advance(task))

            image = _run(run)
            words = re.sub(r"[^\w]+", "-", prompt).strip("-")[:60] or "prompt"
            path = out / f"{index:03}-{seed + index}-{words}.png"
            pixels = image.pixels.mul(255).round().clamp(0, 255).byte()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
            progress.console.print(f"{path}  {image.seconds:.2f} s")


def comparison_table(comparison: Comparison, title: str) -> Table:
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


def make_schedule(name: str, mean: float, more_at: Direction = Direction.noisy, maximum: float = 0.75) -> Schedule:
    """A schedule by name with a mean ratio; raises ValueError with what is allowed."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose from {', '.join(SCHEDULES)}")
    if not 0 <= mean < 1:
        raise ValueError(f"a ratio must lie in [0, 1), not {mean:g}")
    if mean > maximum:
        raise ValueError(f"a ratio of {mean:g} is more than cells of 2 × 2 tokens allow, which is {maximum:g}")
    schedule = SCHEDULES[name].with_mean(mean, maximum)
    return schedule if more_at is Direction.noisy else schedule.reversed()


def _config(schedule: str, ratio: float, more_at: Direction, max_downsample: int) -> ToMeConfig:
    try:
        return ToMeConfig(ratio=make_schedule(schedule, ratio, more_at), max_downsample=max_downsample)
    except ValueError as error:
        _fail(str(error))


def _sampling(steps: int, guidance: float, size: str | None) -> Sampling:
    width = height = None
    if size is not None:
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
        if not match or int(match[1]) == 0 or int(match[2] or 1) == 0:
            _fail(f"size must be a number of pixels or WIDTHxHEIGHT, not {size!r}")
        width, height = int(match[1]), int(match[2] or match[1])
    return Sampling(steps, guidance, height, width)


def _prompts(prompts: list[str] | None, model: str) -> list[str]:
    if not prompts:
        if model != TINY:
            _fail("give at least one prompt")
        return PROMPTS
    return prompts


def _load(model: str, device: str | None, dtype: str | None) -> tuple[Any, str]:
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "float16")
    if dtype not in DTYPES:
        _fail(f"unknown dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        _fail(f"device {device!r} cannot be used: {str(error).splitlines()[0]}")
    warnings.simplefilter("ignore", FutureWarning)
    for library in (diffusers.utils.logging, transformers.utils.logging):  # their bars and hints are not for this user
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        return load_model(model, device, DTYPES[dtype]), f"{device}, {dtype}, torch {torch.__version__}"
    except ModelError as error:
        _fail(str(error))


def _run(call: Any) -> Any:
    try:
        return call()
    except ValueError as error:  # the host's own checks, of sizes and the like
        _fail(str(error))


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "permission denied")
    except OSError as error:
        _fail(f"cannot write to {folder}: {error.strerror}")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip


def _fail(message: str) -> NoReturn:
    print(f"tomesd-plus: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(2)
