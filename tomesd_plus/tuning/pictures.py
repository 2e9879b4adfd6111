"""Generate the pictures of a set of prompts with a plan, and compare them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tomesd_plus.caching import FeatureCacheConfig
from tomesd_plus.host.models import denoiser_of, unwrapped
from tomesd_plus.host.transformers import is_known_transformer
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.presets import Preset, PresetReport, preset
from tomesd_plus.presets.named import ON_ALL_STEPS, UNDER_A_CACHE
from tomesd_plus.schedules import StepPlan
from tomesd_plus.tuning.plans import Merging, Plan

BEST_PSNR = 100.0
"""In dB, where pictures are the same or nearly so."""


@dataclass(frozen=True)
class Task:
    """What is generated, however it is sped up.

    Args:
        pipe: The pipeline.
        steps: Solver steps of the untouched pictures.
        guidance_scale: ``None``: the pipeline's default.
        seed: Of the first prompt; each further one has the next.
        batch_size: Prompts in one call.
        options: What else each call is given.
    """

    pipe: Any
    steps: int
    guidance_scale: float | None
    seed: int
    batch_size: int
    options: dict[str, Any]

    def pictures(self, prompts: Sequence[tuple[int, str]], steps: int | None = None) -> Tensor:
        """The pictures of prompts that have numbers, with whatever is switched on: (prompts, …), on the CPU."""
        made = []
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            options = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
            negative = {name: text for name, text in self.options.items() if name.startswith("negative_prompt")}
            repeated = {name: [text] * len(batch) for name, text in negative.items() if isinstance(text, str)}
            result = self.pipe(
                prompt=[prompt for _, prompt in batch],
                num_inference_steps=self.steps if steps is None else steps,
                generator=[torch.Generator().manual_seed(self.seed + number) for number, _ in batch],
                output_type="pt",
                **(options | self.options | repeated),
            )
            images = torch.as_tensor(result[0]).detach().float().cpu()
            if len(images) != len(batch):
                raise ValueError(f"expected a picture a prompt, not {len(images)} of {len(batch)} prompts")
            made.append(images)
        pictures = torch.cat(made)
        if not pictures.isfinite().all():
            raise ValueError("the pipeline gives what is no number: choose another data type")
        return pictures


def squared_error(pictures: Tensor, references: Tensor) -> Tensor:
    """Of each picture: (prompts,)."""
    return (pictures - references).square().flatten(1).mean(1)


def psnr_of(error: Tensor) -> float:
    """The mean over pictures in dB, of squared errors (prompts,) of values in [0, 1]."""
    return float((-10 * error.clamp(min=10 ** (-BEST_PSNR / 10)).log10()).mean())


def merging_of(pipe: Any, merging: Merging) -> ToMeConfig | None:
    """What a kind of merging is on a pipeline: transformers have no cached steps, so they merge on all that run."""
    if merging == "none":
        return None
    if is_known_transformer(unwrapped(denoiser_of(pipe))):
        return ToMeConfig(ratio=0.5)
    return UNDER_A_CACHE if merging == "cached" else ON_ALL_STEPS


def preset_of(pipe: Any, plan: Plan, levels: Sequence[float] | None, description: str = "") -> Preset:
    """A plan as a preset for a pipeline, without what was measured of it.

    Args:
        pipe: The pipeline.
        plan: The plan.
        levels: Noise levels of its steps, by which it is carried over to others; ``None``: it goes by numbers.
        description: Which steps run in full, in a line.
    """
    cache = None
    if set(plan.letters) != {"F"}:
        steps = StepPlan(plan.letters, None if levels is None else tuple(levels))
        cache = FeatureCacheConfig(plan=steps, forecast=plan.forecast, order=plan.order)
    return Preset(description, merging_of(pipe, plan.merging), cache, merging_inside=None, steps=plan.steps)


@contextmanager
def switched_on(pipe: Any, plan: Plan) -> Iterator[PresetReport]:
    """A plan inside a ``with`` block; yields its reports."""
    with preset(pipe, preset_of(pipe, plan, None)) as report:
        yield report


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bar is off, and as it was again after."""
    before = getattr(pipe, "_progress_bar_config", None)
    with ExitStack() as stack:
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(**((before or {}) | {"disable": True}))
            stack.callback(_put_back, pipe, before)
        yield


def _put_back(pipe: Any, before: dict[str, Any] | None) -> None:
    if before is None:
        vars(pipe).pop("_progress_bar_config", None)
    else:
        pipe._progress_bar_config = before
