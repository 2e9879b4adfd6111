"""Options that several commands share, and the settings that are made of them."""

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tomesd_plus.cli.common import fail, quiet, run
from tomesd_plus.cli.names import DOWNSAMPLES, PRESETS
from tomesd_plus.evaluation.names import DTYPES, KARRAS, SCHEDULERS, TINY
from tomesd_plus.schedules import AUTO, SCHEDULES, Direction, schedule_by_name

if TYPE_CHECKING:
    from tomesd_plus.evaluation.configurations import Configuration
    from tomesd_plus.evaluation.generation.sampling import Sampling

PROMPTS = [
    "a large dog on a blue background",
    "a small strawberry on the left of a yellow striped background",
    "a large ladybug on a pink gradient background",
    "a small star and a small red heart on a purple background",
]


def _check_ratio(ratio: float) -> float:
    _refuse_wrong("constant", ratio)
    return ratio


def _check_ratios(ratios: list[float] | None) -> list[float] | None:
    return None if ratios is None else [_check_ratio(ratio) for ratio in ratios]


def _check_schedule(name: str) -> str:
    _refuse_wrong(name, 0.5)
    return name


def _check_max_downsample(downsample: int) -> int:
    if downsample not in DOWNSAMPLES:
        fail(f"max_downsample must be one of {', '.join(map(str, DOWNSAMPLES))}, not {downsample}")
    return downsample


def _refuse_wrong(schedule: str, ratio: float) -> None:
    """Fail in a line at once, before anything that takes long is imported."""
    try:
        schedule_by_name(schedule, ratio)
    except ValueError as error:
        fail(str(error))


Ratio = Annotated[float, typer.Option(callback=_check_ratio, help="Mean ratio in [0, 1); 0 merges nothing.")]
Ratios = Annotated[
    list[float] | None,
    typer.Option(
        "--ratio",
        callback=_check_ratios,
        help="Mean ratio in [0, 1); repeatable. Default: 0.5; none with --preset.",
    ),
]
Prompts = Annotated[list[str] | None, typer.Argument(help="One prompt or several.", show_default=False)]
Model = Annotated[str, typer.Option(help="'tiny' (embedded), a hub id, a folder, or a .safetensors checkpoint.")]
ScheduleName = Annotated[
    str,
    typer.Option("--schedule", callback=_check_schedule, help=f"Ratio over steps: {', '.join(SCHEDULES)}, {AUTO}."),
]
MoreAt = Annotated[Direction, typer.Option(help="Merge more at noisy steps or at clean ones.")]
MaxDownsample = Annotated[
    int,
    typer.Option(
        callback=_check_max_downsample, help="Merge at levels of at most this downsample: 1, 2, 4, 8; SDXL: 2."
    ),
]
CacheInterval = Annotated[
    int | None,
    typer.Option(min=1, help="Feature cache: run the full UNet on every n-th step only.", show_default=False),
]
PresetName = Annotated[
    str, typer.Option("--preset", help=f"A preset of merging and cache: {', '.join(PRESETS)}, or a file of one.")
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help=f"In place of the model's own: {', '.join(SCHEDULERS)}, or a class of diffusers; with {KARRAS} after it "
        "for Karras' noise levels.",
        show_default=False,
    ),
]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")]
Guidance = Annotated[
    float | None,
    typer.Option(min=0, help="Guidance scale; 1 switches it off. Default: 3 with the embedded pipeline, else 7.5."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the first prompt; each further prompt has the next seed.")]
Size = Annotated[str | None, typer.Option(help="Pixels: 512, or WIDTHxHEIGHT. Default: the model's own.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps … Default: the best available.")]


def _check_dtype(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in DTYPES:
        fail(f"unknown dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    return dtype


Dtype = Annotated[
    str | None,
    typer.Option(callback=_check_dtype, help=f"{', '.join(DTYPES)}. Default: float16 on a GPU, else float32."),
]


def merging_from(
    ratio: float, schedule: str, more_at: Direction, max_downsample: int, cache_interval: int | None
) -> "Configuration":
    """The merging, with or without a feature cache, that options ask for."""
    from tomesd_plus.evaluation.configurations import Configuration

    merge = {"ratio": ratio, "schedule": schedule, "more_at": str(more_at), "max_downsample": max_downsample}
    switches: dict[str, dict[str, Any]] = {"merge": merge}
    if cache_interval is None:
        return run(lambda: Configuration(f"ratio {ratio:g}", switches))
    cache = {"interval": cache_interval}
    return run(lambda: Configuration(f"ratio {ratio:g}, cache {cache_interval}", switches | {"cache": cache}))


def preset_from(name: str, force: bool = True) -> "Configuration":
    """A preset as a configuration; ``force`` keeps it where it is refused, to be compared there."""
    from tomesd_plus.evaluation.configurations import Configuration

    return run(lambda: Configuration(f"preset {name}", {"preset": {"name": name, "force": force}}))


def sampling_from(steps: int, guidance: float | None, size: str | None, model: str) -> "Sampling":
    """The sampling that options ask for."""
    width = height = None
    if size is not None:
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
        if not match or int(match[1]) == 0 or int(match[2] or 1) == 0:
            fail(f"size must be a number of pixels or WIDTHxHEIGHT, not {size!r}")
        width, height = int(match[1]), int(match[2] or match[1])
    quiet()
    from tomesd_plus.evaluation.generation.models import usual_guidance
    from tomesd_plus.evaluation.generation.sampling import Sampling

    return Sampling(steps, usual_guidance(model) if guidance is None else guidance, height, width)


def prompts_from(prompts: list[str] | None, model: str) -> list[str]:
    """The prompts given; the embedded model has some of its own."""
    if not prompts:
        if model != TINY:
            fail("give at least one prompt")
        return PROMPTS
    return prompts
