"""Call a pipeline: generate images from prompts and seeds, and time it."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tomesd_plus.evaluation.configurations import Configuration
from tomesd_plus.evaluation.items import Item
from tomesd_plus.host.clock import now


@dataclass(frozen=True)
class Sampling:
    """Sampling options.

    Args:
        steps: Denoising steps.
        guidance_scale: Scale of classifier-free guidance; 1 or less switches it off.
        height, width: Size of the image in pixels; the model's default size by default.
        negative_prompt: What the image should not show.
    """

    steps: int = 25
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Generated:
    """An image and its time.

    Args:
        pixels: (3, height, width) in [0, 1], float32, on the CPU.
        seconds: Time of the call: text encoding, denoising and decoding, without the time spent in ``on_step``.
        step_seconds: Mean time of a denoising step; a mean, because full and cached steps differ. Without the first
            step, whose time includes other work, if there are more.
    """

    pixels: Tensor
    seconds: float
    step_seconds: float


@dataclass(frozen=True)
class GeneratedBatch:
    """The images of one call and its time.

    Args:
        pixels: (count, 3, height, width) in [0, 1], float32, on the CPU; NaN if a half-precision model overflows.
        seconds, step_seconds: As in :class:`Generated`, for the whole batch.
        withheld: For each image, whether the pipeline's safety checker replaced it by a black one.
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
    """Generate one image.

    Args:
        pipe: A text-to-image pipeline.
        prompt: The prompt.
        seed: Seed of the initial noise, which is drawn on the CPU so that it is the same on every device.
        sampling: Steps, guidance and size.
        on_step: Called after each step with its index.
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
    """Generate an image for each prompt and seed in one call; each image has its own random generator."""
    ticks: list[float] = []
    watched = 0.0  # seconds spent in on_step
    device = pipe.unet.device

    def tick(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal watched
        tick = now(device)
        ticks.append(tick - watched)
        if on_step:
            on_step(step)
        watched += now(device) - tick
        return tensors

    negative = None if sampling.negative_prompt is None else [sampling.negative_prompt] * len(prompts)
    start = now(device)
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
    seconds = now(device) - start - watched
    between = [late - early for early, late in pairwise(ticks)] or [seconds]
    withheld = getattr(result, "nsfw_content_detected", None) or [False] * len(prompts)
    return GeneratedBatch(
        torch.as_tensor(result.images).float().cpu(), seconds, statistics.fmean(between), tuple(map(bool, withheld))
    )


def run_batch(pipe: Any, items: Sequence[Item], configuration: Configuration, sampling: Sampling) -> GeneratedBatch:
    """Generate one batch with a configuration that has been switched on."""
    sampling = replace(sampling, steps=configuration.steps or sampling.steps)
    seeds = [item.noise_seed(configuration.seed_offset) for item in items]
    with _fixed_global_generator(pipe.unet.device):
        return generate_batch(pipe, [item.prompt for item in items], seeds, sampling)


@contextmanager
def _fixed_global_generator(device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global generator, from which tomesd for one draws, so that images are reproducible."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
