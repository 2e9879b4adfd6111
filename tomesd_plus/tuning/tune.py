"""Choose what runs at which step, on the user's own model."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal, overload

import torch

from tomesd_plus.caching.apply import cached_steps_possible
from tomesd_plus.caching.cache import feature_cache_on
from tomesd_plus.host.models import denoiser_of, unwrapped
from tomesd_plus.host.names import device_name, model_name, scheduler_name
from tomesd_plus.host.say import warn
from tomesd_plus.merging.apply import is_merging
from tomesd_plus.presets import Measured, Preset, Row
from tomesd_plus.tuning.arguments import checked, default_steps
from tomesd_plus.tuning.choose import best_of, best_within, budget_of, choose, fastest_within, fewer_steps
from tomesd_plus.tuning.costs import measured_costs, merges_on_steps
from tomesd_plus.tuning.pictures import Task, preset_of, psnr_of, quiet, squared_error, switched_on
from tomesd_plus.tuning.plans import Costs, Plan, even_plans
from tomesd_plus.tuning.progress import Bar
from tomesd_plus.tuning.trials import Trials
from tomesd_plus.version import __version__


@overload
def tune(pipe: Any, prompts: Sequence[str], *, speedup: Sequence[float], **options: Any) -> list[Preset]: ...
@overload
def tune(pipe: Any, prompts: Sequence[str], *, speedup: float | None = None, **options: Any) -> Preset: ...
def tune(
    pipe: Any,
    prompts: Sequence[str],
    *,
    speedup: float | Sequence[float] | None = None,
    psnr: float | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    costs: Costs | Mapping[str, float] | None = None,
    steps: Literal["kept", "free"] = "kept",
    max_generations: float = 60,
    batch_size: int = 1,
    progress: bool = True,
    **call: Any,
) -> Preset | list[Preset]:
    """Find what each step of a pipeline is to run, so that its pictures stay closest at a speed.

    One untouched generation of each prompt is recorded. Errors of forecasts of skipped calls are then told without any
    run, and those of cached steps by running the outer layers alone. A few probes tell what an error at a step does to
    the picture. Dynamic programming over the steps finds the plans of least error at a cost, as DPCache (2025) does
    for Flux; with extrapolated outputs as ZEUS' (2026) predictor and DeepCache's features
    (https://arxiv.org/abs/2312.00858) as what runs between full steps. Far from the recorded way errors add up no
    more, so the finalists are tried on pictures, beside even caches and even skips, and the best is bettered step by
    step, the likeliest change first. What is returned is never below an even cache, an even skip or, with
    ``steps="free"``, fewer steps at the same speed, on the prompts that were chosen on.

    Args:
        pipe: A diffusers pipeline with any UNet or transformer, as it is to be used: its scheduler, adapters and
            ControlNets. It is left untouched. Token merging and caches must be off.
        prompts: The prompts to choose on, at least one. Every fourth is kept aside, one of two or three: its figures
            are told, and nothing is chosen on it.
        speedup: How many times faster the denoising calls shall be, larger than 1; several share one calibration.
        psnr: In place of ``speedup``: the fastest plan whose pictures have so many dB.
        num_inference_steps: Of the untouched pictures; the pipeline's default, mostly 50, by default.
        guidance_scale: The pipeline's default by default.
        seed: Of the first prompt's noise; each further one has the next. The same seed and costs give the same result.
        costs: What steps cost as shares of a full one: :class:`Costs`, or a mapping of its names. Measured on this
            pipeline by default.
        steps: ``"kept"``, or ``"free"``: plans of fewer solver steps may be chosen too; the preset's ``steps`` then
            says with how many to call. Without it fewer steps stand beside the result and may be better: then a
            warning says so.
        max_generations: How much work it may be, in untouched generations of all prompts that are chosen on. Recording
            and probes, even caches and skips, which are never to be closer, and two finalists a speed are made
            whatever it says: some 8, and at each speed-up ``s`` 13 / s (with ``steps="free"`` 25 / s).
        batch_size: Prompts in one call: more are faster, and take more memory.
        progress: Show a bar with the time left.
        call: What else each call of the pipeline is given: ``image``, ``mask_image``, ``height``, …

    Returns:
        A :class:`~tomesd_plus.Preset` with what was measured; a list of them where several speed-ups were asked for,
        without those that no plan has, of which a warning tells. After Ctrl-C the best so far, without figures on
        prompts kept aside.

    Raises:
        ValueError: An argument is out of range, or no plan reaches the speed or the fidelity.
        TypeError: ``pipe`` has no denoiser.

    Example:
        >>> from tomesd_plus import load_tiny_pipeline, tune
        >>> pipe = load_tiny_pipeline()
        >>> preset = tune(pipe, ["a large star on a blue background"], speedup=1.3, num_inference_steps=8,
        ...               steps="free", costs={"cached": 0.1}, max_generations=6, progress=False)
        >>> preset.measured.speedup >= 1.3
        True
    """
    wanted = checked(prompts, speedup, psnr, num_inference_steps, seed, steps, max_generations, batch_size, call)
    denoiser = denoiser_of(pipe)
    if feature_cache_on(denoiser) is not None or (
        hasattr(denoiser, "set_attn_processor") and is_merging(unwrapped(denoiser))
    ):
        raise ValueError("merging or a feature cache is on: remove it first, tune chooses from the untouched pipeline")
    held = [(number, prompt) for number, prompt in enumerate(prompts) if number % 4 == min(3, len(prompts) - 1)]
    held = held if len(prompts) > 1 else []
    chosen_on = [pair for pair in enumerate(prompts) if pair not in held]
    count = default_steps(pipe) if num_inference_steps is None else num_inference_steps
    task = Task(pipe, count, guidance_scale, seed, batch_size, dict(call))
    caches = cached_steps_possible(pipe)
    with ExitStack() as stack:
        stack.enter_context(quiet(pipe))
        bar = stack.enter_context(Bar(max_generations, progress))
        given = None if costs is None else Costs.of(costs)
        found = measured_costs(task, chosen_on[:1], caches) if given is None else given
        if not merges_on_steps(pipe, caches):
            found = replace(found, cached_merged=None, full_merged=None)
        trials = Trials(task, chosen_on, found, max_generations, caches, bar.advance)
        plans: dict[float, Plan | None] = {}
        interrupted: KeyboardInterrupt | None = None
        try:
            if psnr is not None:
                plans[psnr] = fastest_within(trials, psnr, steps == "free")
            else:
                plans |= dict.fromkeys(choose(trials, wanted, steps == "free"))
        except KeyboardInterrupt as stopped:
            interrupted = stopped
            held = []  # what was asked for is an end
            if psnr is not None:
                plans[psnr] = best_within(trials, psnr, steps == "free")
            plans |= dict.fromkeys(wanted if task.steps in trials.recordings else ())
        if psnr is None:
            plans = {each: best_of(trials, each, steps == "free") for each in plans}
        found_plans = [(each, plan) for each, plan in plans.items() if plan is not None]
        if interrupted is not None and not found_plans:
            raise interrupted
        if not found_plans:
            goal = f"speedup={speedup}" if psnr is None else f"psnr={psnr}"
            raise ValueError(f"no plan of {count} steps has {goal}: ask for less, or give more max_generations")
        missed = [f"{each:g}" for each in wanted if plans.get(each) is None]
        if missed and interrupted is None:
            warn(f"no plan of {count} steps is {', '.join(missed)} times as fast: ask for less, or steps='free'")

        def measured(held: list[tuple[int, str]]) -> list[Preset]:
            return [
                _measured(trials, plan, trials.speedup(plan) if psnr else each, held, given is None, steps == "free")
                for each, plan in found_plans
            ]

        try:
            presets = measured(held)
        except KeyboardInterrupt:  # while the figures on prompts kept aside are made
            presets = measured([])
        if not isinstance(speedup, Sequence):
            return presets[0]
        by_speed = dict(zip((each for each, _ in found_plans), presets, strict=True))
        return [by_speed[each] for each in wanted if each in by_speed]


def _measured(
    trials: Trials, plan: Plan, wanted: float, held: list[tuple[int, str]], measured: bool, free: bool
) -> Preset:
    """A plan as a preset, with what was measured of it and of what stands beside it."""
    task, made = trials.task, trials.full
    fewer = fewer_steps(trials, wanted)
    even = [
        each
        for each in even_plans(len(made.levels), budget_of(trials, wanted), trials.costs, made.calls, trials.caches)
        if each.called_with(task.steps) in trials.tried
    ]
    even = [each.called_with(task.steps) for each in even]
    beside = [*fewer, *([max(even, key=trials.psnr)] if even else [])]
    fast = [each for each in fewer if trials.speedup(each) >= wanted - 1e-6]
    if not free and fast and trials.psnr(fast[0]) > trials.psnr(plan) + 0.05:
        warn(
            f"{fast[0].steps} steps are closer than what tune has found at this speed: "
            f"{trials.psnr(fast[0]):.1f} dB beside {trials.psnr(plan):.1f}. Let it choose with steps='free'.",
            stacklevel=3,
        )
    aside = _held_out(trials, [plan, *beside], held)
    rows = tuple(
        Row(str(each) if set(each.letters) != {"F"} else f"{each.steps} steps", trials.speedup(each),
            trials.psnr(each), aside.get(each))
        for each in beside
    )  # fmt: skip
    speedup = trials.speedup(plan)
    whole, denoising = made.seconds
    saved = denoising * (1 - 1 / speedup)
    levels = trials.recording(plan.steps)
    counts = {kind: plan.letters.count(kind) for kind in "FCS"}
    description = (
        f"{counts['F']} of {len(plan.letters)} steps in full, {counts['C']} cached, {counts['S']} skipped: {plan}"
    )
    denoiser = denoiser_of(task.pipe)
    figures = Measured(
        model=model_name(denoiser),
        scheduler=scheduler_name(getattr(task.pipe, "scheduler", None)),
        steps=task.steps,
        guidance_scale=task.guidance_scale,
        size=f"{made.size[0]} × {made.size[1]}",
        device=device_name(denoiser),
        versions=f"torch {torch.__version__}, diffusers {version('diffusers')}, tomesd_plus {__version__}",
        prompts=len(trials.prompts),
        held_out=len(held),
        speedup=speedup,
        whole_speedup=whole / (whole - saved) if measured else None,
        psnr=trials.psnr(plan),
        held_out_psnr=aside.get(plan),
        costs=trials.costs.named(),
        costs_measured=measured,
        generations=round(trials.spent),
        beside=rows,
    )
    return replace(
        preset_of(task.pipe, plan, levels.levels if levels.falling else None, description), measured=figures
    )


def _held_out(trials: Trials, plans: list[Plan], held: list[tuple[int, str]]) -> dict[Plan, float]:
    """The figures of plans on the prompts that nothing was chosen on."""
    if not held:
        return {}
    references, found = trials.task.pictures(held), {}
    for plan in plans:
        with switched_on(trials.task.pipe, plan):
            found[plan] = psnr_of(squared_error(trials.task.pictures(held, plan.steps), references))
    return found
