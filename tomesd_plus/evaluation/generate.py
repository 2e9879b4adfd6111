"""Pictures from prompts and seeds, with their times."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled.

    Args:
        steps: Denoising steps.
        guidance_scale: Of classifier-free guidance; 1 or less switches it off.
        height, width: Of the picture in pixels; the model's own size by default.
        negative_prompt: What the picture should not show.
    """

    steps: int = 25
    guidance_scale: float = 5.0
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Generated:
    """A picture and how long it took.

    Args:
        pixels: (3, height, width) in [0, 1], float32, on the CPU.
        seconds: The whole call: text encoding, denoising, decoding; without what ``on_step`` took.
        step_seconds: The median denoising step; the first is left out where there are more.
    """

    pixels: Tensor
    seconds: float
    step_seconds: float


@dataclass(frozen=True)
class GeneratedBatch:
    """Pictures made in one call, and how long it took.

    Args:
        pixels: (count, 3, height, width) in [0, 1], float32, on the CPU; NaN where a half-precision model overflows.
        seconds, step_seconds: As in :class:`Generated`, for all pictures together.
        withheld: Which pictures the pipeline's safety checker replaced by black ones.
    """

    pixels: Tensor
    seconds: float
    step_seconds: float
    withheld: tuple[bool, ...]


def generate(
    pipe: Any,
    prompt: str,
    seed: int,
    sampling: Sampling,
    on_step: Callable[[int], None] | None = None,
) -> Generated:
    """Generate one picture.

    Args:
        pipe: A text-to-image pipeline.
        prompt: The caption.
        seed: Of the initial noise, drawn on the CPU, so that it is the same on every device.
        sampling: Steps, guidance and size.
        on_step: Called with the number of the step after each one.
    """
    batch = generate_batch(pipe, [prompt], [seed], sampling, on_step)
    return Generated(batch.pixels[0], batch.seconds, batch.step_seconds)


def generate_batch(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    on_step: Callable[[int], None] | None = None,
) -> GeneratedBatch:
    """Generate a picture for each prompt and seed in one call; each has a generator of its own."""
    ticks: list[float] = []
    watched = 0.0  # seconds spent in on_step

    def tick(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal watched
        tick = _now()
        ticks.append(tick - watched)
        if on_step:
            on_step(step)
        watched += _now() - tick
        return tensors

    negative = None if sampling.negative_prompt is None else [sampling.negative_prompt] * len(prompts)
    start = _now()
    result = pipe(
        list(prompts),
        negative_prompt=negative,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        height=sampling.height,
        width=sampling.width,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        callback_on_step_end=tick,
    )
    seconds = _now() - start - watched
    between = [late - early for early, late in pairwise(ticks)] or [seconds]
    withheld = getattr(result, "nsfw_content_detected", None) or [False] * len(prompts)
    return GeneratedBatch(
        torch.as_tensor(result.images).float().cpu(), seconds, statistics.median(between), tuple(map(bool, withheld))
    )


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter()
