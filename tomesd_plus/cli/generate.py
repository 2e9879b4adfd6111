"""``tomesd-plus generate``: images from prompts."""

import re
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tomesd_plus.cli.common import check_writable, fail, load, progress_bar, run
from tomesd_plus.cli.options import (
    CacheInterval,
    Device,
    Dtype,
    Guidance,
    MaxDownsample,
    Model,
    MoreAt,
    PresetName,
    Prompts,
    Ratio,
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

OF_PRESETS = {"ratio", "schedule", "more_at", "max_downsample", "cache_interval"}


def generate_command(
    context: typer.Context,
    prompts: Prompts = None,
    model: Model = TINY,
    ratio: Ratio = 0.5,
    schedule: ScheduleName = "cosine",
    more_at: MoreAt = Direction.noisy,
    max_downsample: MaxDownsample = 1,
    cache_interval: CacheInterval = None,
    preset: PresetName = "",
    steps: Steps = 25,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    seed: Seed = 0,
    size: Size = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("images"),
) -> None:
    """Generate an image for each prompt, with or without merging and caching."""
    chosen = prompts_from(prompts, model)
    if preset:
        given = {
            name for name in OF_PRESETS if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
        }
        if given:
            fail(f"a preset has its own {', '.join(sorted(given))}: leave out --preset or these")
    sampling = sampling_from(steps, guidance, size, model)
    from tomesd_plus.evaluation.generation.sampling import generate
    from tomesd_plus.evaluation.images import to_image

    if preset:
        configuration = preset_from(preset, force=False)
    else:
        configuration = merging_from(ratio, schedule, more_at, max_downsample, cache_interval)
    check_writable(out)
    pipe, where = load(model, device, dtype, scheduler=scheduler)
    with configuration.switched_on(pipe), progress_bar() as progress:
        task = progress.add_task(where, total=len(chosen) * steps)
        for index, prompt in enumerate(chosen):
            call = partial(generate, pipe, prompt, seed + index, sampling, lambda step: progress.advance(task))
            image = run(call)
            words = re.sub(r"[^\w]+", "-", prompt).strip("-")[:60] or "prompt"
            path = out / f"{index:03}-{seed + index}-{words}.png"
            to_image(image.pixels).save(path)
            progress.console.print(f"{path}  {image.seconds:.2f} s")
