"""Draw the pages' pictures with the embedded pipeline: writes ``docs/pictures/``, in two minutes of a core."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from tomesd_plus import CosineSchedule, LinearSchedule, feature_cache, load_tiny_pipeline, preset, token_merging
from tomesd_plus.evaluation.reporting.overlays import difference, merge_map_overlay
from tomesd_plus.metrics.fidelity import psnr

FOLDER = Path(__file__).parent / "pictures"
PROMPTS = ("a large penguin on an orange striped background", "a large ladybug on a pink gradient background")
STEPS = 25
GAIN = 16
Way = AbstractContextManager[Any]


class Pictures:
    """Makes pictures of one pipeline."""

    def __init__(self) -> None:
        self.pipe: Any = load_tiny_pipeline()
        self.pipe.set_progress_bar_config(disable=True)

    def make(self, prompt: str, way: Way | None = None) -> tuple[Tensor, list[Tensor]]:
        """A picture (3, height, width), and the latents after each step."""
        latents: list[Tensor] = []

        def keep(pipe: Any, step: int, timestep: int, values: dict[str, Any]) -> dict[str, Any]:
            latents.append(values["latents"].clone())
            return values

        with nullcontext() if way is None else way:
            images = self.pipe(
                prompt, num_inference_steps=STEPS, guidance_scale=3, generator=torch.Generator().manual_seed(0),
                output_type="pt", callback_on_step_end=keep,
            ).images  # fmt: skip
        return images[0], latents


def overview(pictures: Pictures) -> Figure:
    """Untouched, merged, and under each preset."""
    names = ["untouched", "half the tokens merged", "preset quality", "preset balanced", "preset fast"]
    figure, axes = _grid(len(PROMPTS), len(names), 1.75)
    for number, (row, prompt) in enumerate(zip(axes, PROMPTS)):
        ways = [None, token_merging(pictures.pipe, ratio=0.5)]
        ways += [preset(pictures.pipe, name.split()[1]) for name in names[2:]]
        made = [pictures.make(prompt, way)[0] for way in ways]
        for index, (axis, name, picture) in enumerate(zip(row, names, made)):
            _show(axis, picture)
            axis.set_title("" if number else name, fontsize=9)
            axis.set_xlabel(f"{psnr(picture, made[0]):.0f} dB" if index else "", fontsize=9)
    return figure


def merging(pictures: Pictures) -> Figure:
    """Which tokens merge at a noisy step, in the middle and at a clean one: a generation that ends there."""
    figure, axes = _grid(1, 4, 2)
    _show(axes[0][0], pictures.make(PROMPTS[0])[0])
    axes[0][0].set_title("the picture", fontsize=9)
    for axis, last in zip(axes[0][1:], (2, STEPS // 2, STEPS - 1)):
        with token_merging(pictures.pipe, ratio=CosineSchedule(0.7, 0.3)) as report:

            def stop(pipe: Any, step: int, timestep: int, values: dict[str, Any], last: int = last) -> dict[str, Any]:
                pipe._interrupt = step >= last
                return values

            picture = pictures.pipe(
                PROMPTS[0], num_inference_steps=STEPS, guidance_scale=3, output_type="pt",
                generator=torch.Generator().manual_seed(0), callback_on_step_end=stop,
            ).images[0]  # fmt: skip
            _show(axis, merge_map_overlay(picture, report.merge_map()))
            removed = report.steps[last].removed[1]
        axis.set_title(f"step {last + 1}: {removed:.0%} merged", fontsize=9)
    return figure


def beside(pictures: Pictures, ways: Sequence[tuple[str, Way]]) -> Figure:
    """The untouched picture, and what each way changes."""
    figure, axes = _grid(1, 1 + len(ways), 2)
    untouched = pictures.make(PROMPTS[1])[0]
    _show(axes[0][0], untouched)
    axes[0][0].set_title("untouched", fontsize=9)
    for axis, (name, way) in zip(axes[0][1:], ways):
        picture = pictures.make(PROMPTS[1], way)[0]
        _show(axis, difference(picture, untouched, GAIN))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(f"difference × {GAIN}: {psnr(picture, untouched):.1f} dB", fontsize=8)
    return figure


def schedules() -> Figure:
    """Ratio over the noise level."""
    figure = Figure(figsize=(6, 2.8), layout="constrained")
    axis = figure.subplots()
    cosine = CosineSchedule(noisy=0.7, clean=0.3)
    LinearSchedule(noisy=0.7, clean=0.3).plot(axis, label="linear")
    cosine.plot(axis, label="cosine, the default")
    cosine.reversed().plot(axis, label="cosine, more at clean steps")
    cosine.quantized(4).plot(axis, label="cosine in 4 plateaus")
    axis.legend(fontsize=8)
    return figure


def depths(pictures: Pictures) -> Figure:
    """What runs at each step under the presets."""
    colours = {"full": "#00695c", "cached": "#80cbc4", "skipped": "#eceff1"}
    figure = Figure(figsize=(7, 1.7), layout="constrained")
    axis = figure.subplots()
    names = ("quality", "balanced", "fast")
    for row, name in enumerate(names):
        with preset(pictures.pipe, name) as report:
            pictures.pipe(PROMPTS[0], num_inference_steps=STEPS, guidance_scale=3, output_type="latent")
            assert report.cache is not None
            for step in report.cache.steps:
                assert step.index is not None
                left = step.index + 0.53
                axis.barh(-row, 0.94, 0.8, left=left, color=colours[step.kind], edgecolor="#90a4ae", lw=0.5)
    for kind, colour in colours.items():
        axis.barh(0, 0, color=colour, label=kind)
    axis.set(yticks=[0, -1, -2], yticklabels=names, xlabel="step", xlim=(0.4, STEPS + 0.6))
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    return figure


def forecasts(pictures: Pictures) -> Figure:
    """How far the latents are from the untouched ones after each step."""
    figure = Figure(figsize=(6, 2.8), layout="constrained")
    axis = figure.subplots()
    untouched = pictures.make(PROMPTS[1])[1]
    options: dict[str, dict[str, Any]] = {
        "taken again (forecast=0)": {"forecast": 0.0},
        "along the trend (forecast=0.85)": {"forecast": 0.85},
        "whole calls skipped (branch='nothing')": {"branch": "nothing"},
    }
    for name, option in options.items():
        latents = pictures.make(PROMPTS[1], feature_cache(pictures.pipe, interval=3, **option))[1]
        error = [float((a - b).norm() / b.norm()) for a, b in zip(latents, untouched)]
        axis.plot(range(1, STEPS + 1), error, label=name)
    axis.set(xlabel="step", ylabel="distance of the latents", ylim=0)
    axis.legend(fontsize=8)
    return figure


def _grid(rows: int, columns: int, side: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(side * columns, side * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure, axes


def _show(axis: Any, picture: Tensor) -> None:
    axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).float().numpy(), interpolation="nearest")


def _save(figure: Figure, name: str) -> None:
    path = FOLDER / f"{name}.png"
    figure.savefig(path, dpi=110)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main() -> None:
    """Draw them all."""
    FOLDER.mkdir(exist_ok=True)
    pictures = Pictures()
    pipe = pictures.pipe
    _save(overview(pictures), "overview")
    _save(merging(pictures), "merging")
    without = token_merging(pipe, ratio=0.5, proportional_attention=False)
    _save(
        beside(pictures, [("a merged key weighs once", without), ("s times", token_merging(pipe, ratio=0.5))]),
        "proportional-attention",
    )
    plain = token_merging(pipe, ratio=0.5, plan_per="block")
    kept = token_merging(pipe, ratio=0.5, plan_per="block", full_steps=4)
    _save(beside(pictures, [("copied back", plain), ("each with its offset", kept)]), "details")
    _save(schedules(), "schedules")
    _save(depths(pictures), "depths")
    _save(forecasts(pictures), "forecasts")


if __name__ == "__main__":
    main()
