"""Makes the pictures and the figures. Knows nothing of a page: whatever calls it gets tensors, numbers and words."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradio_app.results import Result, Shot
from gradio_app.runs import OnProgress, Run
from gradio_app.settings import Candidate, Limits, Picture, Refused
from gradio_app.snippet import snippet
from tomesd_plus import (
    FeatureCacheConfig,
    FeatureCacheReport,
    TokenMergingReport,
    ToMeConfig,
    feature_cache,
    token_merging,
)
from tomesd_plus.evaluation.generation.devices import device_name, peak_memory
from tomesd_plus.evaluation.generation.sampling import Sampling, generate_batch
from tomesd_plus.evaluation.names import TINY
from tomesd_plus.host.names import solver_name
from tomesd_plus.metrics.fidelity import psnr, ssim
from tomesd_plus.presets import PRESETS, Preset
from tomesd_plus.presets.tested import why_not

MAX_BASELINES = 16
MAX_CANDIDATES = 9
WARM_UP_STEPS = 2
MEBIBYTE = 2**20


class Backend:
    """One pipeline that several users share: it makes one picture at a time, and every run leaves it untouched.

    Args:
        pipe: A text-to-image pipeline with a UNet, untouched.
        model: The name it was loaded by, for the page and the code.
        dtype: Its dtype by name.
        presets: Those to offer beside the package's, by the names of their files.
    """

    def __init__(
        self, pipe: Any, model: str = TINY, dtype: str = "float32", presets: Mapping[str, Preset] | None = None
    ) -> None:
        self.pipe = pipe
        self.presets = {**PRESETS, **(presets or {})}
        self.model = model
        self.dtype = dtype
        self.limits = Limits.of(pipe)
        self.device = device_name(pipe.unet.device)
        self._lock = threading.Lock()
        self._baselines: OrderedDict[Picture, Shot] = OrderedDict()
        self._warm: set[tuple[object, ...]] = set()

    def compare(
        self,
        picture: Picture,
        candidate: Candidate,
        on_progress: OnProgress | None = None,
        stop: threading.Event | None = None,
    ) -> Result:
        """The untouched pipeline and a candidate with the same seed; takes what :meth:`explore` takes."""
        return self.explore(picture, [candidate], on_progress, stop)[0]

    def explore(
        self,
        picture: Picture,
        candidates: Sequence[Candidate],
        on_progress: OnProgress | None = None,
        stop: threading.Event | None = None,
    ) -> list[Result]:
        """The untouched pipeline, unless its picture is remembered, and each candidate, with the same seed.

        Args:
            picture: What all have in common.
            candidates: 1 to 9.
            on_progress: Called before the first step and after each one.
            stop: Once it is set, the run ends after the current step, or at once while it waits for its turn.

        Raises:
            Refused: A value is not allowed, or a model gave no picture; the message is for the user.
            Cancelled: ``stop`` was set.
        """
        if not 1 <= len(candidates) <= MAX_CANDIDATES:
            raise Refused(f"choose 1 to {MAX_CANDIDATES} settings, not {len(candidates)}")
        self.limits.check(picture)
        configs = [candidate.configs(self.pipe, self.presets) for candidate in candidates]
        run = Run(on_progress, stop or threading.Event())
        with run.turn(self._lock):
            baseline = self._baselines.get(picture)
            run.total = (len(candidates) + (baseline is None)) * self._steps(picture)
            warmed_up = self._warm_up(picture, configs, run)
            remembered = baseline is not None
            if baseline is None:
                baseline = self._shoot(picture, run.watch("Without merging"))
                self._baselines[picture] = baseline
            self._baselines.move_to_end(picture)
            while len(self._baselines) > MAX_BASELINES:
                self._baselines.popitem(last=False)
            results = []
            for candidate, (merging, cache) in zip(candidates, configs, strict=True):
                result = self._candidate(picture, candidate, merging, cache, baseline, run)
                results.append(replace(result, remembered=remembered, warmed_up=warmed_up))
        return results

    def remembers(self, picture: Picture) -> bool:
        """True if a candidate for this picture costs one image, not two."""
        return picture in self._baselines

    def _candidate(
        self,
        picture: Picture,
        candidate: Candidate,
        merging: ToMeConfig | None,
        cache: FeatureCacheConfig | None,
        baseline: Shot,
        run: Run,
    ) -> Result:
        merge_maps: dict[tuple[int, int], Tensor] = {}
        watch = run.watch(candidate.name.capitalize())
        with _switched_on(self.pipe, merging, cache) as (report, cached):

            def on_step(step: int) -> None:
                levels = report.steps[-1].removed if report is not None and report.steps else {}
                for level, share in levels.items():
                    merge_map = report.merge_map(level) if report is not None and share else None
                    if merge_map is not None:
                        merge_maps[step, level] = merge_map.short()
                watch(step)

            shot = self._shoot(picture, on_step)
        equal = torch.equal(shot.pixels, baseline.pixels)
        refused = self._refused(candidate.preset, picture.steps)
        return Result(
            candidate, baseline, shot,
            psnr=None if equal else psnr(shot.pixels, baseline.pixels).item(),
            ssim=ssim(shot.pixels, baseline.pixels).item(),
            code=snippet(picture, merging, cache, candidate.preset, self.model, str(self.pipe.device), self.dtype,
                         bool(refused)),
            steps=self._steps(picture),
            removed={level: share for level, share in report.removed.items() if share} if report else {},
            cached_steps=cached.cached if cached else 0,
            skipped_steps=cached.skipped if cached else 0,
            merge_maps=merge_maps,
            notes=(*_notes(report), *refused),
        )  # fmt: skip

    def _shoot(self, picture: Picture, on_step: Callable[[int], None]) -> Shot:
        """Generate one picture with whatever is switched on."""
        sampling = Sampling(
            picture.steps, picture.guidance_scale, picture.height, picture.width, picture.negative_prompt or None
        )
        precision = self.pipe.vae.dtype
        try:
            with peak_memory(self.pipe.unet.device) as peak:
                made = generate_batch(self.pipe, [picture.prompt], [picture.seed], sampling, on_step)
        finally:
            if self.pipe.vae.dtype != precision:  # SDXL decodes in float32, and an error leaves it there
                self.pipe.vae.to(precision)
        if made.withheld[0]:
            raise Refused("the model's safety checker withheld the picture: try another prompt or seed")
        if not made.pixels.isfinite().all():
            raise Refused(f"the model overflows in {self.dtype}: start the app with another --dtype")
        return Shot(made.pixels[0], made.seconds, peak[0] / MEBIBYTE)

    def _refused(self, preset: str | None, steps: int) -> tuple[str, ...]:
        """Why the package refuses a preset by name here, where the app shows what it does all the same."""
        solver = solver_name(self.pipe.scheduler)
        reason = why_not(preset, solver, steps) if preset in PRESETS and preset is not None else None
        return () if reason is None else (f"{reason[0].upper()}{reason[1:]}.",)

    def _warm_up(
        self,
        picture: Picture,
        configs: Sequence[tuple[ToMeConfig | None, FeatureCacheConfig | None]],
        run: Run,
    ) -> bool:
        """Run a few steps, not timed, of each kind that never ran: it sets itself up. True if there was one."""
        short = replace(picture, steps=min(WARM_UP_STEPS, picture.steps))
        warmed_up = False
        for merging, cache in ((None, None), *configs):
            kind = (picture.width, picture.height, picture.guidance_scale > 1, cache is None, _layers(merging))
            if kind not in self._warm:
                with _switched_on(self.pipe, merging, cache):
                    self._shoot(short, run.watch("First run of its kind: warming up", counted=False))
                self._warm.add(kind)
                warmed_up = True
        return warmed_up

    def _steps(self, picture: Picture) -> int:
        """How many steps the scheduler makes of those asked for: PNDM one more, a second-order one nearly double."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(picture.steps)
        return len(scheduler.timesteps)


@contextmanager
def _switched_on(
    pipe: Any, merging: ToMeConfig | None, cache: FeatureCacheConfig | None
) -> Iterator[tuple[TokenMergingReport | None, FeatureCacheReport | None]]:
    """Switch merging and a cache on inside the block; restore the pipeline afterwards, whatever happens."""
    with ExitStack() as stack:
        report = None if merging is None else stack.enter_context(token_merging(pipe, merging))
        cached = None if cache is None else stack.enter_context(feature_cache(pipe, cache))
        yield report, cached


def _layers(merging: ToMeConfig | None) -> tuple[object, ...]:
    """The parts of a configuration that need a warm-up of their own; ratios and schedules do not."""
    if merging is None:
        return ()
    return (merging.max_downsample, merging.full_steps, merging.layers)


def _notes(report: TokenMergingReport | None) -> tuple[str, ...]:
    if report is None or report.merged:
        return ()
    reasons = "; ".join(sorted({str(layer.reason) for layer in report.layers if layer.reason}))
    return (f"Nothing was merged: {reasons or 'no layer ran on enough tokens'}.",)
