"""The same prompts and seeds under several settings, interleaved, beside the untouched pipeline."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tomesd_plus.config import ToMeConfig
from tomesd_plus.evaluation.configurations import OTHER_SEED
from tomesd_plus.evaluation.fidelity import psnr, ssim
from tomesd_plus.evaluation.generate import Generated, Sampling, generate
from tomesd_plus.evaluation.speed import equal_time_steps
from tomesd_plus.evaluation.switches import tomesd_patch
from tomesd_plus.pipeline import token_merging
from tomesd_plus.report import StepRecord, TokenMergingReport


@dataclass(frozen=True)
class Setting:
    """A way to run a pipeline.

    Args:
        name: Shown in the table.
        switched_on: ``pipe -> context manager`` inside which the setting holds; it may yield a report.
        steps: Denoising steps, if other than the baseline's.
        seed_offset: Added to every seed.
    """

    name: str
    switched_on: Callable[[Any], AbstractContextManager[TokenMergingReport | None]]
    steps: int | None = None
    seed_offset: int = 0

    @classmethod
    def untouched(cls, name: str = "untouched", steps: int | None = None, seed_offset: int = 0) -> "Setting":
        """The pipeline as it is."""
        return cls(name, lambda pipe: nullcontext(), steps, seed_offset)

    @classmethod
    def merging(cls, name: str, config: ToMeConfig) -> "Setting":
        """Token merging by this package."""
        return cls(name, lambda pipe: token_merging(pipe, config))

    @classmethod
    def tomesd(cls, ratio: float, max_downsample: int = 1) -> "Setting":
        """Token merging as tomesd does it."""
        options = {"ratio": ratio, "max_downsample": max_downsample}
        return cls(f"tomesd's way, {ratio:g}", lambda pipe: tomesd_patch(pipe, **options))


@dataclass
class Row:
    """What one setting gave; one entry a prompt in each list."""

    name: str
    steps: int
    generated: list[Generated] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    speedups: list[float] = field(default_factory=list)
    removed: dict[int, float] = field(default_factory=dict)
    merge_maps: list[Tensor | None] = field(default_factory=list)
    step_records: list[StepRecord] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median time of an image."""
        return statistics.median(image.seconds for image in self.generated)

    @property
    def step_seconds(self) -> float:
        """Time of a denoising step: the mean over its steps, the median over prompts."""
        return statistics.median(image.step_seconds for image in self.generated)

    @property
    def speedup(self) -> float:
        """Median over prompts of the baseline's time divided by this setting's, run one after the other."""
        return statistics.median(self.speedups)


@dataclass
class Comparison:
    """The baseline's row and one for each setting."""

    prompts: list[str]
    baseline: Row
    rows: list[Row]


def compare(
    pipe: Any,
    prompts: Sequence[str],
    settings: Sequence[Setting],
    sampling: Sampling,
    seed: int = 0,
    equal_time: bool = False,
    on_step: Callable[[str], None] | None = None,
) -> Comparison:
    """Run the untouched pipeline and each setting on the same prompts and seeds.

    Prompt i has seed ``seed + i``. For every prompt the baseline and all settings run in turn, so that a machine's
    noise meets them alike. A short run of each goes before, as a warm-up.

    Args:
        pipe: A text-to-image pipeline, untouched.
        prompts: At least one.
        settings: What to compare.
        sampling: Steps, guidance, size.
        seed: Of the first prompt.
        equal_time: Add, for every setting that was faster, the untouched pipeline with as many fewer steps.
        on_step: Called with a setting's name after each of its steps, warm-ups included.
    """
    if not prompts:
        raise ValueError("compare needs at least one prompt")
    baseline = Setting.untouched()
    for setting in (baseline, *settings):
        _run(pipe, setting, prompts[0], seed, replace(sampling, steps=min(2, sampling.steps)), on_step)
    reference, *rows = _rows(pipe, prompts, [baseline, *settings], sampling, seed, on_step)
    if equal_time:
        fewer = {
            equal_time_steps(sampling.steps, row.speedup, reference.seconds, reference.step_seconds)
            for setting, row in zip(settings, rows, strict=True)
            if row.speedup > 1 and setting.steps is None and not setting.seed_offset
        }
        slower = [
            Setting.untouched(f"{steps} steps", steps=steps)
            for steps in sorted(fewer, reverse=True)
            if steps < sampling.steps
        ]
        if slower:
            rows += _rows(pipe, prompts, [baseline, *slower], sampling, seed, on_step)[1:]
    return Comparison(list(prompts), reference, rows)


def peer_settings(ratios: Sequence[float], max_downsample: int = 1) -> list[Setting]:
    """The settings that frame a comparison: tomesd at the same ratios, and the noise floor, another seed."""
    floor = Setting.untouched("another seed", seed_offset=OTHER_SEED)
    return [*(Setting.tomesd(ratio, max_downsample) for ratio in ratios), floor]


def _rows(
    pipe: Any,
    prompts: Sequence[str],
    settings: Sequence[Setting],
    sampling: Sampling,
    seed: int,
    on_step: Callable[[str], None] | None,
) -> list[Row]:
    rows = [Row(setting.name, setting.steps or sampling.steps) for setting in settings]
    for index, prompt in enumerate(prompts):
        for setting, row in zip(settings, rows, strict=True):
            image, report, merge_map = _run(pipe, setting, prompt, seed + index, sampling, on_step)
            row.generated.append(image)
            row.merge_maps.append(merge_map)
            base = rows[0].generated[index]
            row.speedups.append(base.seconds / image.seconds)
            row.psnr.append(psnr(image.pixels, base.pixels).item())
            row.ssim.append(ssim(image.pixels, base.pixels).item())
            if report is not None:
                row.removed, row.step_records = report.removed, report.steps
    return rows


def _run(
    pipe: Any,
    setting: Setting,
    prompt: str,
    seed: int,
    sampling: Sampling,
    on_step: Callable[[str], None] | None,
) -> tuple[Generated, TokenMergingReport | None, Tensor | None]:
    sampling = replace(sampling, steps=min(setting.steps or sampling.steps, sampling.steps))
    merge_map = None
    with setting.switched_on(pipe) as report:

        def after(step: int) -> None:
            nonlocal merge_map
            if report is not None and step == sampling.steps // 2:
                merge_map = report.merge_map()
            if on_step:
                on_step(setting.name)

        image = generate(pipe, prompt, seed + setting.seed_offset, sampling, after)
    return image, report, merge_map
