"""One picture from one prompt and seed, with its times."""

import statistics
import time
from collections.abc import Callable
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

    start = _now()
    result = pipe(
        prompt,
        negative_prompt=sampling.negative_prompt,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        height=sampling.height,
        width=sampling.width,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        callback_on_step_end=tick,
    )
    seconds = _now() - start - watched
    between = [late - early for early, late in pairwise(ticks)] or [seconds]
    return Generated(result.images[0].float().cpu(), seconds, statistics.median(between))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter()
