"""Choose plans: by dynamic programming over recorded errors, then by pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor

from tomesd_plus.tuning.errors import Errors
from tomesd_plus.tuning.plans import Merging, Plan, even_plans, neighbours, repeated_plans
from tomesd_plus.tuning.search import best_plans
from tomesd_plus.tuning.trials import Trials, measured_gains

FORECASTS = (1.0, 0.85, 0.7, 0.5)
PROBES = 7
REPEATED = 3
"""Repeated patterns that are tried on pictures, the likeliest best."""
FEWER = (0.8, 0.65, 0.5)
"""Solver steps, as shares of the untouched pictures', that plans of fewer steps may have."""
SURE = 2
"""Plans that are tried whatever work is left: as a rule the likeliest best of each of two kinds."""
PATIENCE = 15
"""Changes of the best plan that are tried in vain before it is left."""


def choose(trials: Trials, wanted: Sequence[float], free: bool) -> Iterator[float]:
    """Try plans for each speed-up; yields it when that begins. What was tried is in ``trials``.

    Args:
        trials: Nothing was tried yet.
        wanted: Speed-ups of the denoising calls.
        free: Plans of fewer solver steps may be chosen.
    """
    gains, weights = calibrate(trials)
    for number, speedup in enumerate(wanted):
        yield speedup
        end = trials.spent + trials.left / (len(wanted) - number)
        for plan in simple_plans(trials, speedup, free):
            trials.error(plan)
        for rank, plan in enumerate(planned(trials, gains, weights, speedup, free)):
            if rank < SURE or trials.spent < end:
                trials.error(plan)
        better(trials, gains, weights, speedup, free, end)


def calibrate(trials: Trials) -> tuple[Tensor, Tensor]:
    """Record the untouched pictures; returns what an error at each step does to them, and the prompts' weights.

    A prompt whose pictures suffer more from the same weighs less: the figure in the end is a mean of logarithms.
    """
    made = trials.recording(trials.task.steps)
    gains = measured_gains(trials, min(PROBES, max(2, int(trials.most / 6))))
    change = made.outputs[2:] - 2 * made.outputs[1:-1] + made.outputs[:-2]
    suffers = (change.square().mean(-1) * gains[2:]).sum(0) if len(made.outputs) > 2 else torch.ones(gains.shape[1])
    weights = 1 / suffers.clamp(min=1e-12)
    return gains, weights / weights.sum()


def budget_of(trials: Trials, speedup: float) -> float:
    """What a plan may cost, in full calls."""
    return sum(trials.full.calls) / speedup


def record_fewer_steps(trials: Trials, speedup: float) -> None:
    """Record the most steps that alone are so fast, and one more, which is slower and only told.

    Some solvers call more often than once a step, and image-to-image takes a part of the steps.
    """
    steps = min(int(trials.task.steps / speedup + 1e-9) + 1, trials.task.steps - 1)
    while usable(trials, steps) and steps >= 1:
        if trials.speedup(trials.untouched(steps)) >= speedup - 1e-6:
            return
        steps -= 1


def fewer_steps(trials: Trials, speedup: float) -> list[Plan]:
    """Of fewer steps that were recorded the closest that are so fast, then the next slower ones."""
    others = [trials.untouched(steps) for steps in trials.recordings if steps != trials.task.steps]
    fast = [plan for plan in others if trials.speedup(plan) >= speedup - 1e-6]
    slow = [plan for plan in others if plan not in fast]
    return [*sorted(fast, key=lambda plan: plan.steps)[-1:], *sorted(slow, key=lambda plan: plan.steps)[:1]]


def simple_plans(trials: Trials, speedup: float, free: bool) -> list[Plan]:
    """Even caches and even skips at a speed-up, which what is chosen must not be below; fewer steps are recorded."""
    budget = budget_of(trials, speedup)
    made = trials.full
    plans = even_plans(len(made.levels), budget, trials.costs, made.calls, trials.caches)
    plans = [plan.called_with(trials.task.steps) for plan in plans]
    record_fewer_steps(trials, speedup)
    if free:
        for steps in _free_steps(trials, speedup):
            calls = trials.recording(steps).calls
            others = even_plans(len(calls), budget, trials.costs, calls, trials.caches)
            plans += [plan.called_with(steps) for plan in others if plan.forecast == 1.0 and plan.order == 1]
    return plans


def usable(trials: Trials, steps: int) -> bool:
    """True for so many solver steps as make at least one step: image-to-image takes a part of them."""
    return steps * len(trials.full.levels) >= trials.task.steps


def _free_steps(trials: Trials, speedup: float) -> list[int]:
    steps, least = trials.task.steps, int(trials.task.steps / speedup)
    return sorted(
        {
            round(steps * share)
            for share in FEWER
            if max(3, least) < round(steps * share) < steps and usable(trials, round(steps * share))
        }
    )


def planned(trials: Trials, gains: Tensor, weights: Tensor, speedup: float, free: bool) -> list[Plan]:
    """The plans that dynamic programming gives, and repeated patterns, in turn, the likeliest best of each first."""
    budget = budget_of(trials, speedup)
    found: dict[Plan, float] = {}
    patterns: dict[Plan, float] = {}
    mergings: list[Merging] = ["none"]
    mergings += ["cached"] if trials.costs.cached_merged is not None else []
    can_merge = trials.costs.full_merged is not None
    mergings += ["all"] if can_merge and (trials.costs.cached_merged is not None or not trials.caches) else []
    for steps in [trials.task.steps, *(_free_steps(trials, speedup) if free else [])]:
        errors, calls = trials.errors(steps, gains, weights), trials.recording(steps).calls
        base = float((trials.error(trials.untouched(steps)) * weights).sum())
        for repeated in repeated_plans(len(calls), budget, trials.costs, calls, trials.caches):
            patterns[repeated.called_with(steps)] = base + errors.of(repeated)
        for merging in mergings:
            for forecast in FORECASTS[:2] if trials.caches and merging == "none" else FORECASTS[:1]:
                plan = best_plans(errors, trials.costs, calls, [budget], forecast, merging=merging)[0]
                if plan is not None and not _idle(plan, trials.caches):
                    found.setdefault(plan.called_with(steps), base + errors.of(plan))
    likely = sorted(patterns, key=lambda plan: patterns[plan])[:REPEATED]
    in_turn = zip_longest(sorted(found, key=lambda plan: found[plan]), likely)
    return [plan for pair in in_turn for plan in pair if plan is not None]


def best_of(trials: Trials, speedup: float, free: bool) -> Plan | None:
    """The plan of those tried whose pictures are closest, at least so fast."""
    allowed = [
        plan
        for plan in trials.tried
        if trials.speedup(plan) >= speedup - 1e-6 and (free or plan.steps == trials.task.steps)
    ]
    return max(allowed, key=lambda plan: (trials.psnr(plan), str(plan)), default=None)


def better(trials: Trials, gains: Tensor, weights: Tensor, speedup: float, free: bool, end: float) -> None:
    """Try changes of the best plan, the likeliest first, until they or the work are at an end.

    Args:
        trials: With plans that were tried.
        gains, weights: From :func:`calibrate`.
        speedup: That plans must have.
        free: Plans of fewer solver steps may be chosen.
        end: The work, in all, after which to stop.
    """
    known: dict[int, Errors] = {}
    varied: set[tuple[float, int | None]] = set()  # ways of forecasting that were tried
    vain = 0
    best = best_of(trials, speedup, free)
    while best is not None and vain < PATIENCE and trials.spent < end:
        if best.steps not in known:
            known[best.steps] = trials.errors(best.steps, gains, weights)
        plan = _likeliest(trials, known[best.steps], best, budget_of(trials, speedup), varied)
        if plan is None:
            return
        varied.add((plan.forecast, plan.order))
        trials.error(plan)
        following = best_of(trials, speedup, free)
        vain, best = (vain + 1, best) if following == best else (0, following)


def _likeliest(
    trials: Trials, errors: Errors, best: Plan, budget: float, varied: set[tuple[float, int | None]]
) -> Plan | None:
    """The untried change of a plan of least predicted error; another way of forecasting is tried once."""
    options = [replace(best, order=order) for order in (1, 2, None)] if "S" in best.letters else []
    options += [replace(best, forecast=share) for share in FORECASTS] if "C" in best.letters else []
    options = [plan for plan in options if (plan.forecast, plan.order) not in varied]
    changed = [plan for plan in [*options, *neighbours(best, trials.caches)] if plan not in trials.tried]
    allowed = [plan for plan in changed if trials.cost(plan) <= budget + 1e-9 and not _idle(plan, trials.caches)]
    return min(allowed, key=lambda plan: (errors.of(plan), str(plan)), default=None)


def _idle(plan: Plan, caches: bool) -> bool:
    """True for a plan that says in another way what a plainer one says; a UNet's merging follows its cached steps."""
    cached = "C" in plan.letters
    return (
        ("S" not in plan.letters and plan.order != 1)
        or (not cached and plan.forecast != 1.0)
        or (caches and not cached and plan.merging != "none")
    )


def fastest_within(trials: Trials, psnr: float, free: bool) -> Plan | None:
    """The fastest plan whose pictures have so many dB; ``None`` if only the untouched ones have.

    Of the plans that dynamic programming gives for many speeds the fastest within is found by halving; then the next
    faster ones are bettered as long as there is work left.
    """
    gains, weights = calibrate(trials)
    speeds = [1.15 * 1.1**number for number in range(20)]
    plans = _plans_at(trials, gains, weights, speeds)
    low, high = -1, len(speeds)
    while high - low > 1:
        middle = (low + high) // 2
        plan = plans[middle]
        if plan is not None and trials.psnr(plan) >= psnr:
            low = middle
        else:
            high = middle
    for speedup in speeds[low + 1 : low + 3]:
        for plan in simple_plans(trials, speedup, free):
            trials.error(plan)
        better(trials, gains, weights, speedup, free, trials.spent + trials.left / 2)
    best = best_within(trials, psnr, free)
    for plan in [] if best is None else simple_plans(trials, trials.speedup(best), free):
        trials.error(plan)  # to stand beside it
    return best_within(trials, psnr, free)


def best_within(trials: Trials, psnr: float, free: bool) -> Plan | None:
    """The fastest plan of those tried whose pictures have so many dB, if it is faster than the untouched ones."""
    within = [
        plan
        for plan in trials.tried
        if (free or plan.steps == trials.task.steps) and trials.psnr(plan) >= psnr and trials.speedup(plan) > 1
    ]
    return max(within, key=lambda plan: (trials.speedup(plan), trials.psnr(plan), str(plan)), default=None)


def _plans_at(trials: Trials, gains: Tensor, weights: Tensor, speeds: Sequence[float]) -> list[Plan | None]:
    steps = trials.task.steps
    errors = trials.errors(steps, gains, weights)
    budgets = [budget_of(trials, speed) for speed in speeds]
    plans = best_plans(errors, trials.costs, trials.full.calls, budgets)
    return [None if plan is None else plan.called_with(steps) for plan in plans]
