"""What a user chooses, and what a model allows: every value is checked here, whoever sends it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tomesd_plus import FeatureCacheConfig, Schedule, ToMeConfig
from tomesd_plus.host.models import attention_levels
from tomesd_plus.merging.config import LAYERS
from tomesd_plus.presets import PRESETS, Preset
from tomesd_plus.schedules import SCHEDULES, schedule_by_name

MAX_PROMPT = 500  # characters
MAX_STEPS = 100
MAX_GUIDANCE = 30.0
MAX_SEED = 2**32 - 1
MAX_INTERVAL = 10
MAX_SIDE = 1536  # pixels, whatever the model
MAX_RATIO = 0.75  # of cells of 2 × 2 tokens

MERGED: dict[str, dict[str, Any]] = {
    "self-attention": {},
    "both attentions": {"layers": LAYERS[:2]},
    "attentions, MLP": {"layers": LAYERS},
    "whole blocks": {"layers": "block"},
}
"""Around which layers to merge, in words, as options of :class:`tomesd_plus.ToMeConfig`."""


class Refused(ValueError):
    """What a user asked for cannot be done; the message says why and is shown on the page."""


@dataclass(frozen=True)
class Picture:
    """What both pictures have in common, so all that the baseline depends on.

    Args:
        prompt: At most 500 characters.
        negative_prompt: What the picture should not show; likewise.
        seed: Of the initial noise, in [0, 2³² − 1].
        steps: Denoising steps, 1 to 100.
        guidance_scale: Of classifier-free guidance, 0 to 30; 1 or less switches it off.
        width, height: In pixels, within the model's :class:`Limits`.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    width: int
    height: int


@dataclass(frozen=True)
class Candidate:
    """What is compared with the baseline.

    Args:
        ratio: Mean share of tokens to remove, in [0, 0.75]; 0 merges nothing.
        schedule: Of the ratio over the steps: constant, linear, cosine, steps or auto.
        more_at: At which steps it merges more: noisy or clean.
        merged: Around which layers, a key of :data:`MERGED`.
        max_downsample: The coarsest level to merge at: 1, 2, 4 or 8.
        cache_interval: The full UNet runs on every n-th step; 1 to 10, 1: on every step.
        preset: One of the package's presets, in place of all the others; ``None``: none.
    """

    ratio: float = 0.5
    schedule: str = "cosine"
    more_at: str = "noisy"
    merged: str = "self-attention"
    max_downsample: int = 1
    cache_interval: int = 1
    preset: str | None = None

    @property
    def name(self) -> str:
        """A short name, for a grid and a plot."""
        if self.preset:
            return self.preset
        cache = f", cache {self.cache_interval}" if self.cache_interval > 1 else ""
        return f"ratio {self.ratio:g}{cache}"

    def configs(
        self, pipe: Any, presets: Mapping[str, Preset] = PRESETS
    ) -> tuple[ToMeConfig | None, FeatureCacheConfig | None]:
        """What to switch on for a pipeline; ``None`` for what stays off.

        Args:
            pipe: The pipeline.
            presets: Those that may be chosen: a user's text opens no file.

        Raises:
            Refused: A value is outside its range; the message says what is allowed.
        """
        try:
            return self._configs(pipe, presets)
        except ValueError as error:  # the package's own checks, whose messages are for users too
            raise Refused(str(error)) from error

    def _configs(
        self, pipe: Any, presets: Mapping[str, Preset]
    ) -> tuple[ToMeConfig | None, FeatureCacheConfig | None]:
        if self.preset is not None:
            if self.preset not in presets:
                raise Refused(f"unknown preset {self.preset!r}: choose from {', '.join(presets)}")
            chosen = presets[self.preset]
            return chosen.merging_for(pipe), chosen.cache
        _check_range("the ratio", self.ratio, 0, MAX_RATIO)
        _check_integer("the cache interval", self.cache_interval, 1, MAX_INTERVAL)
        if self.merged not in MERGED:
            raise Refused(f"cannot merge {self.merged!r}: choose from {', '.join(MERGED)}")
        schedule = schedule_by_name(self.schedule, self.ratio, self.more_at)
        schedule = schedule.replaced(
            [round(ratio, 6) for ratio in schedule.ratios]
        )  # few digits, for the code that is shown
        merging = ToMeConfig(ratio=schedule, max_downsample=self.max_downsample, **MERGED[self.merged])
        cache = FeatureCacheConfig(interval=self.cache_interval)
        return merging if self.ratio > 0 else None, cache if self.cache_interval > 1 else None


def described(preset: Preset, pipe: Any) -> Candidate:
    """The candidate nearest to a preset, to show what that does; it may do more than a candidate can."""
    merging = preset.merging_for(pipe)
    mean_interval = 1
    if preset.cache is not None:
        interval, plan = preset.cache.interval, preset.cache.plan
        mean_interval = interval if isinstance(interval, int) else round(fmean(interval.intervals))
        if plan is not None:
            mean_interval = min(MAX_INTERVAL, round(len(plan.letters) / max(1, plan.letters.count("F"))))
    if merging is None:
        return Candidate(ratio=0.0, cache_interval=mean_interval)
    schedule = next(iter(merging.schedules.values()))
    mean = round(schedule.mean(), 2) if isinstance(schedule, Schedule) else 0.5
    named = {type(each).__name__: name for name, each in SCHEDULES.items()}
    ratios = schedule.ratios
    merged = next(name for name, options in reversed(MERGED.items()) if all(getattr(merging, key) for key in options))
    return Candidate(
        ratio=mean,
        schedule=named.get(type(schedule).__name__, "constant"),
        more_at="noisy" if ratios[0] >= ratios[-1] else "clean",
        merged=merged,
        max_downsample=merging.max_downsample,
        cache_interval=mean_interval,
    )


@dataclass(frozen=True)
class Limits:
    """What a model allows.

    Args:
        side: The model's own side, in pixels.
        smallest, largest: The sides allowed, in pixels.
        multiple: Each side is a multiple of it.
        levels: The downsamples at which the model has self-attention, finest first.
    """

    side: int
    smallest: int
    largest: int
    multiple: int
    levels: tuple[int, ...]

    @classmethod
    def of(cls, pipe: Any) -> "Limits":
        """Those of a pipeline: half to twice its own side, at most 1536 pixels."""
        sample_size = pipe.unet.config.sample_size
        side = (sample_size if isinstance(sample_size, int) else max(sample_size)) * pipe.vae_scale_factor
        largest = max(side, min(2 * side, MAX_SIDE))
        return cls(side, side // 2, largest, max(8, pipe.vae_scale_factor), attention_levels(pipe.unet) or (1,))

    def check(self, picture: Picture) -> None:
        """Raise Refused, in words, if a picture cannot be made."""
        if not picture.prompt.strip():
            raise Refused("the prompt is empty: type what the picture should show")
        for name, text in (("prompt", picture.prompt), ("negative prompt", picture.negative_prompt)):
            if len(text) > MAX_PROMPT:
                raise Refused(f"the {name} has {len(text)} characters: at most {MAX_PROMPT} are allowed")
        _check_integer("the seed", picture.seed, 0, MAX_SEED)
        _check_integer("the number of steps", picture.steps, 1, MAX_STEPS)
        _check_range("the guidance", picture.guidance_scale, 0, MAX_GUIDANCE)
        for name, side in (("width", picture.width), ("height", picture.height)):
            _check_integer(f"the {name}", side, self.smallest, self.largest)
            if side % self.multiple:
                raise Refused(f"the {name} must be a multiple of {self.multiple} pixels, not {side}")


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise Refused(f"{name} must be a whole number from {least} to {most}, not {value!r}")


def _check_range(name: str, value: object, least: float, most: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not least <= value <= most:  # type: ignore[operator]
        raise Refused(f"{name} must be a number from {least:g} to {most:g}, not {value!r}")
