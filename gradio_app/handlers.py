"""What the page's events do: from the values of its fields to the values of its fields."""

import secrets
from collections.abc import Callable, Generator
from html import escape
from typing import Any, TypeVar

import gradio as gr
from PIL.Image import Image
from torch import Tensor

from gradio_app import drawings, words
from gradio_app.backend import Backend, Result
from gradio_app.runs import Progress, follow
from gradio_app.settings import MAX_SEED, Candidate, Picture, described
from tomesd_plus import ConstantSchedule, Schedule
from tomesd_plus.evaluation import difference, merge_map_overlay, to_image
from tomesd_plus.presets import PRESETS

CUSTOM = "custom"
View = tuple[Tensor, dict[tuple[int, int], Tensor]]
"""What a user's page keeps on the server: the candidate's pixels, and its merge maps by step and level."""
T = TypeVar("T")
COMPARE_OUTPUTS = 12
EXPLORE_OUTPUTS = 5


class Handlers:
    """The page's events.

    Args:
        backend: Makes the pictures.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def compare(
        self,
        prompt: str,
        negative_prompt: str,
        seed: float | None,
        random_seed: bool,
        steps: float,
        guidance_scale: float,
        width: float,
        height: float,
        preset: str,
        ratio: float,
        schedule: str,
        more_at: str,
        merged: str,
        max_downsample: float,
        cache_interval: float,
    ) -> Generator[tuple[Any, ...], None, None]:
        """Generate the picture without merging and the one with it, from the same seed.

        The arguments are those of ``Picture`` and ``Candidate`` in ``gradio_app/settings.py``. What is returned begins
        with the two pictures, the figures and the code.
        """
        picture = picture_from(prompt, negative_prompt, seed, random_seed, steps, guidance_scale, width, height)
        candidate = candidate_from(preset, ratio, schedule, more_at, merged, max_downsample, cache_interval)
        progress = follow(lambda on_progress, stop: self.backend.compare(picture, candidate, on_progress, stop))
        result = yield from _stepwise(progress, lambda told: _running(told, picture.seed, COMPARE_OUTPUTS))
        yield self._shown(picture, result)

    def compare_again(self, *values: Any) -> Generator[tuple[Any, ...], None, None]:
        """A slider was let go: compare if that costs one picture, with the seed there is."""
        values = (*values[:3], False, *values[4:])
        if self.backend.remembers(picture_from(*values[:8])):
            yield from self.compare(*values)
        else:
            yield (gr.skip(),) * COMPARE_OUTPUTS

    def explore(
        self,
        tried: list[str],
        prompt: str,
        negative_prompt: str,
        seed: float | None,
        random_seed: bool,
        steps: float,
        guidance_scale: float,
        width: float,
        height: float,
        schedule: str,
        more_at: str,
        merged: str,
        max_downsample: float,
        cache_interval: float,
    ) -> Generator[tuple[Any, ...], None, None]:
        """Generate a grid: the picture without merging, and one for each ratio or preset that was chosen to be tried.

        The other arguments are those of ``compare``. What is returned begins with the pictures and the figures.
        """
        picture = picture_from(prompt, negative_prompt, seed, random_seed, steps, guidance_scale, width, height)
        others = (schedule, more_at, merged, max_downsample, cache_interval)
        candidates = [
            candidate_from(name, 0, *others) if name in PRESETS else candidate_from(CUSTOM, float(name), *others)
            for name in tried
        ]
        progress = follow(lambda on_progress, stop: self.backend.explore(picture, candidates, on_progress, stop))
        results = yield from _stepwise(progress, lambda told: _running(told, picture.seed, EXPLORE_OUTPUTS))
        baseline = results[0].baseline
        grid = [(to_image(baseline.pixels), f"without merging · {baseline.seconds:.2f} s")]
        grid += [(to_image(result.merged.pixels), words.caption(result)) for result in results]
        told = words.finished(results, self.backend.device)
        yield grid, [words.numbers(result) for result in results], drawings.scatter(results), picture.seed, told

    def curve(self, *values: Any) -> str:
        """The ratio over the steps; takes the fields of :func:`candidate_from`."""
        try:
            merging, _ = candidate_from(*values).configs(self.backend.pipe)
        except ValueError as error:
            return words.status(escape(words.in_words(error)), "failed")
        schedule = None if merging is None else merging.schedules.get(self.backend.limits.levels[0])
        preset = values[0]
        hint = PRESETS[preset].description if preset in PRESETS else None
        return drawings.curve(schedule if isinstance(schedule, Schedule) else ConstantSchedule(0.0), hint)

    def preset(self, name: str) -> list[Any]:
        """The fields of a candidate as a preset sets them, which nobody can change then; without one as they were."""
        if name not in PRESETS:
            return [gr.update(interactive=True)] * 6
        told = described(PRESETS[name], self.backend.pipe)
        shown = (told.ratio, told.schedule, told.more_at, told.merged, told.max_downsample, told.cache_interval)
        return [gr.update(value=value, interactive=False) for value in shown]

    def overlay(self, view: View | None, step: int, level: int) -> tuple[Image | None, str]:
        """The merge map of a step, counted from 1, and a level, over the picture."""
        if view is None:
            return None, ""
        pixels, merge_maps = view
        merge_map = merge_maps.get((int(step) - 1, int(level)))
        if merge_map is None:
            return to_image(merge_map_overlay(pixels, None)), f"Nothing was merged at step {step:g}, level {level}."
        merged = (merge_map > 1).float().mean()
        return to_image(merge_map_overlay(pixels, merge_map)), f"{merged:.0%} of the tokens are in a group."

    def _shown(self, picture: Picture, result: Result) -> tuple[Any, ...]:
        """A result as the fields of the page."""
        baseline, merged = result.baseline.pixels, result.merged.pixels
        steps = sorted({step for step, _ in result.merge_maps})
        levels = sorted({level for _, level in result.merge_maps}) or [self.backend.limits.levels[0]]
        step = steps[len(steps) // 2] + 1 if steps else 1
        view: View = (merged, result.merge_maps)
        overlay, told = self.overlay(view, step, levels[0])
        return (
            (to_image(baseline), to_image(merged)),
            words.numbers(result),
            result.code,
            to_image(difference(merged, baseline)),
            overlay,
            told,
            gr.update(value=step, maximum=max(2, picture.steps)),
            gr.update(choices=[(f"level {level}", level) for level in levels], value=levels[0]),
            words.figures(result),
            view,
            picture.seed,
            words.finished([result], self.backend.device),
        )


def _running(told: str, seed: int, count: int) -> tuple[Any, ...]:
    """The fields of the page while a run is under way: the last two of ``count`` are the seed and the status."""
    return (*(gr.skip(),) * (count - 2), seed, told)


def _stepwise(
    progress: Generator[Progress, None, T], shown: Callable[[str], tuple[Any, ...]]
) -> Generator[tuple[Any, ...], None, T]:
    """Show progress, and an error in words; return what the run returns."""
    yield shown(words.status("Waiting for a turn …", "running"))
    try:
        while True:
            try:
                event = next(progress)
            except StopIteration as ended:
                return ended.value
            yield shown(words.progress_bar(event))
    except Exception as error:
        told = words.in_words(error)
        yield shown(words.status(escape(told), "failed"))
        raise gr.Error(told, print_exception=False) from None
    finally:
        progress.close()


def picture_from(
    prompt: str, negative_prompt: str, seed: float | None, random_seed: bool, steps: float, guidance: float,
    width: float, height: float,
) -> Picture:  # fmt: skip
    """The fields that both pictures have in common; a random seed is drawn here, so that it can be shown."""
    if random_seed or seed is None:
        seed = secrets.randbelow(MAX_SEED + 1)
    return Picture(
        prompt or "", negative_prompt or "", _number(seed), _number(steps), guidance, _number(width), _number(height)
    )


def candidate_from(
    preset: str, ratio: float, schedule: str, more_at: str, merged: str, max_downsample: float, interval: float
) -> Candidate:
    """The fields of what is compared."""
    if preset != CUSTOM:
        return Candidate(preset=preset)
    return Candidate(ratio, schedule, more_at, merged, _number(max_downsample), _number(interval))


def _number(value: Any) -> Any:
    """A whole number as an int, as Python would write it; anything else as it is, to be refused in words."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
