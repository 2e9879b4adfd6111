"""What the page's events do: from the values of its fields to the values of its fields, by name."""

import secrets
from collections.abc import Callable, Generator, Sequence
from html import escape
from threading import Event
from typing import Any, TypeVar

import gradio as gr
from PIL.Image import Image
from torch import Tensor

from gradio_app import drawings, words
from gradio_app.backend import Backend
from gradio_app.results import Result
from gradio_app.runs import Cancelled, OnProgress, follow
from gradio_app.settings import MAX_SEED, Candidate, Picture, Refused, described
from tomesd_plus import ConstantSchedule, Schedule
from tomesd_plus.evaluation.images import to_image
from tomesd_plus.evaluation.reporting.overlays import difference, merge_map_overlay

CUSTOM = "custom"
View = tuple[Tensor, dict[tuple[int, int], Tensor]]
"""What a user's page keeps on the server: the candidate's pixels in bytes, and its merge maps by step and level."""
Shown = dict[str, Any]
"""What the page is to show from now on: values by the names of its fields; the others stay."""
T = TypeVar("T")


class Handlers:
    """The page's events.

    Args:
        backend: Makes the pictures.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._stops: dict[str, Event] = {}  # of the runs under way, by user

    def compare(
        self,
        request: gr.Request,
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
    ) -> Generator[Shown, None, None]:
        """Generate the picture without merging and the one with it, from the same seed.

        The arguments are those of ``Picture`` and ``Candidate`` in ``gradio_app/settings.py``. What is returned begins
        with the two pictures, the figures and the code.
        """
        picture = picture_from(prompt, negative_prompt, seed, random_seed, steps, guidance_scale, width, height)
        candidate = candidate_from(preset, ratio, schedule, more_at, merged, max_downsample, cache_interval)
        result = yield from self._stepwise(
            lambda on_progress, stop: self.backend.compare(picture, candidate, on_progress, stop),
            picture.seed,
            request,
        )
        if result is not None:
            yield self._shown(picture, result)

    def compare_again(
        self,
        request: gr.Request,
        prompt: str,
        negative_prompt: str,
        seed: float | None,
        random_seed: bool,
        steps: float,
        guidance_scale: float,
        width: float,
        height: float,
        *candidate: Any,
    ) -> Generator[Shown, None, None]:
        """A slider was let go: compare if that costs one picture, with the seed there is."""
        picture = (prompt, negative_prompt, seed, False, steps, guidance_scale, width, height)
        if self.backend.remembers(picture_from(*picture)):
            yield from self.compare(request, *picture, *candidate)
        else:
            yield {"status": words.status(words.NOT_REMEMBERED)}

    def explore(
        self,
        request: gr.Request,
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
    ) -> Generator[Shown, None, None]:
        """Generate a grid: the picture without merging, and one for each ratio or preset that was chosen to be tried.

        The other arguments are those of ``compare``. What is returned begins with the pictures and the figures.
        """
        picture = picture_from(prompt, negative_prompt, seed, random_seed, steps, guidance_scale, width, height)
        others = (schedule, more_at, merged, max_downsample, cache_interval)
        candidates = [
            candidate_from(name, 0, *others)
            if name in self.backend.presets
            else candidate_from(CUSTOM, float(name), *others)
            for name in tried
        ]
        results = yield from self._stepwise(
            lambda on_progress, stop: self.backend.explore(picture, candidates, on_progress, stop),
            picture.seed,
            request,
        )
        if results is None:
            return
        baseline = results[0].baseline
        grid = [(to_image(baseline.pixels), f"without merging · {baseline.seconds:.2f} s")]
        grid += [(to_image(result.merged.pixels), words.caption(result)) for result in results]
        yield {
            "grid": grid,
            "numbers": [words.numbers(result) for result in results],
            "plot": drawings.scatter(results),
            "seed": picture.seed,
            "status": words.finished(results, self.backend.device),
        }

    def curve(self, *values: Any) -> str:
        """The ratio over the steps; takes the fields of :func:`candidate_from`."""
        try:
            merging, _ = candidate_from(*values).configs(self.backend.pipe, self.backend.presets)
        except Refused as error:
            return words.status(escape(words.in_words(error)), "failed")
        schedule = None if merging is None else merging.schedules.get(self.backend.limits.levels[0])
        preset = values[0]
        hint = self.backend.presets[preset].description if preset in self.backend.presets else None
        return drawings.curve(schedule if isinstance(schedule, Schedule) else ConstantSchedule(0.0), hint)

    def preset(self, name: str) -> list[Any]:
        """The fields of a candidate as a preset sets them, locked; without one they can be changed from there."""
        if name not in self.backend.presets:
            return [gr.update(interactive=True)] * 6
        near = described(self.backend.presets[name], self.backend.pipe)
        shown = (near.ratio, near.schedule, near.more_at, near.merged, near.max_downsample, near.cache_interval)
        return [gr.update(value=value, interactive=False) for value in shown]

    def overlay(self, view: View | None, step: int, level: int) -> tuple[Image | None, str]:
        """The merge map of a step, counted from 1, and a level, over the picture."""
        if view is None:
            return None, ""
        pixels, merge_maps = view
        merge_map = merge_maps.get((int(step) - 1, int(level)))
        note = f"Nothing was merged at step {step:g}, level {level}."
        if merge_map is not None:
            note = f"{(merge_map > 1).float().mean():.0%} of the tokens are in a group."
        return to_image(merge_map_overlay(pixels / 255, merge_map)), note

    def cancel(self, request: gr.Request) -> None:
        """Stop the run under way of this page's user: gradio's own way to cancel misses one now and then."""
        stop = self._stops.get(_user(request))
        if stop is not None:
            stop.set()

    def _stepwise(
        self, call: Callable[[OnProgress, Event], T], seed: int, request: gr.Request
    ) -> Generator[Shown, None, T | None]:
        """Show the seed and progress, and an error in words; return what the run returns, ``None`` if cancelled."""
        user, stop = _user(request), Event()
        self._stops[user] = stop
        progress = follow(call, stop)
        shown: Shown = {"status": words.status("Waiting for a turn …", "running")}
        try:
            yield {"seed": seed, **shown}
            while True:
                try:
                    event = next(progress)
                except StopIteration as ended:
                    return ended.value
                if event is not None:
                    shown = {"status": words.progress_bar(event)}
                yield shown
        except Cancelled:
            yield {"status": words.status(words.CANCELLED)}
            return None
        except Exception as error:
            text = escape(words.in_words(error))
            yield {"status": words.status(text, "failed")}
            raise gr.Error(text, print_exception=False) from None
        finally:
            progress.close()
            if self._stops.get(user) is stop:
                del self._stops[user]

    def _shown(self, picture: Picture, result: Result) -> Shown:
        """A result as the fields of the page."""
        baseline, merged = result.baseline.pixels, result.merged.pixels
        steps = sorted({step for step, _ in result.merge_maps})
        levels = sorted({level for _, level in result.merge_maps}) or [self.backend.limits.levels[0]]
        step = steps[len(steps) // 2] + 1 if steps else 1
        view: View = ((merged * 255).round().byte(), result.merge_maps)
        overlay, note = self.overlay(view, step, levels[0])
        return {
            "pictures": (to_image(baseline), to_image(merged)),
            "numbers": words.numbers(result),
            "code": result.code,
            "difference": to_image(difference(merged, baseline)),
            "overlay": overlay,
            "overlay_note": note,
            "step": gr.update(value=step, maximum=max(2, result.steps)),
            "level": gr.update(choices=level_choices(levels), value=levels[0]),
            "figures": words.figures(result),
            "view": view,
            "seed": picture.seed,
            "status": words.finished([result], self.backend.device),
        }


def _user(request: gr.Request) -> str:
    """Whose page, or client of the API, has asked."""
    return request.session_hash or ""


def level_choices(levels: Sequence[int]) -> list[tuple[str, int]]:
    """The choices of the merge map's level."""
    return [(f"level {level}", level) for level in levels]


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
    """A whole number as an int, as Python would write it; anything else unchanged, to be refused later."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
