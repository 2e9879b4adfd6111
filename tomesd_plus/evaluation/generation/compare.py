"""Compare configurations with the unmodified pipeline on the same prompts and seeds, interleaved, in memory."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tomesd_plus.evaluation.configurations import OTHER_SEED, Configuration
from tomesd_plus.evaluation.errors import installed
from tomesd_plus.evaluation.generation.sampling import Generated, Sampling, generate
from tomesd_plus.evaluation.generation.timing import equal_time_steps
from tomesd_plus.evaluation.switches import AYS_STEPS, takes_timesteps
from tomesd_plus.merging.generation import StepRecord
from tomesd_plus.merging.report import TokenMergingReport
from tomesd_plus.metrics.fidelity import psnr, ssim


@dataclass
class Row:
    """The results of one configuration. Lists have an entry per prompt; the step records are the last prompt's."""

    name: str
    steps: int
    generated: list[Generated] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    speedups: list[float] = field(default_factory=list)
    removed_by_prompt: list[dict[int, float]] = field(default_factory=list)
    merge_maps: list[Tensor | None] = field(default_factory=list)
    step_records: list[StepRecord] = field(default_factory=list)

    @property
    def removed(self) -> dict[int, float]:
        """Share of tokens removed at each level; mean over prompts."""
        levels = sorted({level for shares in self.removed_by_prompt for level in shares})
        return {
            level: statistics.fmean(shares.get(level, 0.0) for shares in self.removed_by_prompt) for level in levels
        }

    @property
    def seconds(self) -> float:
        """Time per image; median over prompts."""
        return statistics.median(image.seconds for image in self.generated)

    @property
    def step_seconds(self) -> float:
        """Time per denoising step: mean over the steps, median over prompts."""
        return statistics.median(image.step_seconds for image in self.generated)

    @property
    def speedup(self) -> float:
        """The baseline's time divided by this configuration's, run one after the other; median over prompts."""
        return statistics.median(self.speedups)


@dataclass
class Comparison:
    """The baseline's row and one for each configuration."""

    prompts: list[str]
    baseline: Row
    rows: list[Row]


def compare(
    pipe: Any,
    prompts: Sequence[str],
    settings: Sequence[Configuration],
    sampling: Sampling,
    seed: int = 0,
    equal_time: bool = False,
    on_step: Callable[[str], None] | None = None,
) -> Comparison:
    """Run the unmodified pipeline and each configuration on the same prompts and seeds.

    Prompt i has seed ``seed + i``. For each prompt, the baseline and all configurations run in turn, so that changes
    in the machine's load affect all of them alike. A short warm-up of each comes first.

    Args:
        pipe: An unmodified text-to-image pipeline.
        prompts: At least one.
        settings: The configurations to compare.
        sampling: Steps, guidance and size.
        seed: Seed of the first prompt.
        equal_time: For every faster configuration, add the unmodified pipeline with fewer steps at about equal time.
        on_step: Called with a configuration's name after each of its steps, including warm-ups.
    """
    if not prompts:
        raise ValueError("compare needs at least one prompt")
    baseline = Configuration("untouched")
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
            Configuration(f"{steps} steps", steps=steps)
            for steps in sorted(fewer, reverse=True)
            if steps < sampling.steps
        ]
        if slower:
            rows += _rows(pipe, prompts, [baseline, *slower], sampling, seed, on_step)[1:]
    return Comparison(list(prompts), reference, rows)


def peers_of(
    pipe: Any, steps: int, ratios: Sequence[float], max_downsample: int = 1, cache_interval: int | None = None
) -> list[Configuration]:
    """Configurations to compare with.

    tomesd at the same ratios; DeepCache at the same interval, if its package is installed; every second call skipped,
    with its output forecast along a line, as ZEUS (2026) does, and along a parabola; the ten steps of Align Your Steps
    (https://arxiv.org/abs/2404.14507), if the scheduler takes timesteps and ``steps`` are more; and another seed.
    """
    peers = [
        Configuration(f"tomesd's way, {ratio:g}", {"tomesd": {"ratio": ratio, "max_downsample": max_downsample}})
        for ratio in ratios
    ]
    if cache_interval is not None and installed("DeepCache"):
        peers.append(Configuration(f"DeepCache {cache_interval}", {"deepcache": {"interval": cache_interval}}))
    interval = cache_interval if cache_interval and cache_interval > 1 else 2
    for order, line in ((1, "linear"), (2, "quadratic")):
        options = {"interval": interval, "branch": "nothing", "order": order}
        peers.append(Configuration(f"1 of {interval} calls, {line}", {"cache": options}))
    if steps > AYS_STEPS and takes_timesteps(pipe):
        peers.append(Configuration("Align Your Steps, 10 steps", {"ays": {}}, steps=AYS_STEPS))
    return [*peers, Configuration("another seed", seed_offset=OTHER_SEED)]


def _rows(
    pipe: Any,
    prompts: Sequence[str],
    settings: Sequence[Configuration],
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
                row.removed_by_prompt.append(report.removed)
                row.step_records = report.steps
    return rows


def _run(
    pipe: Any,
    setting: Configuration,
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
            if report is not None and (merge_map is None or step <= sampling.steps // 2):
                merge_map = report.merge_map() if report.steps[-1].removed else merge_map  # full steps have none
            if on_step:
                on_step(setting.name)

        image = generate(pipe, prompt, seed + setting.seed_offset, sampling, after)
    return image, report, merge_map
