"""What steps cost, measured on the pipeline at hand."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn

from tomesd_plus.host.clock import now
from tomesd_plus.host.models import denoiser_of, finest_level, unwrapped
from tomesd_plus.host.transformers import is_known_transformer
from tomesd_plus.tuning.pictures import Task, switched_on
from tomesd_plus.tuning.plans import Costs, Plan

ROUNDS = 3


def measured_costs(task: Task, prompts: Sequence[tuple[int, str]], caches: bool) -> Costs:
    """Times of the denoiser's calls of each kind, in turn, as shares of a full one's; medians.

    Args:
        task: What is generated.
        prompts: Those to generate, with their numbers.
        caches: The model has layers that cached steps skip.
    """
    pattern = "FFCS" if caches else "FFS"
    plans = [Plan(("F" + pattern * ROUNDS)[: max(4, task.steps)])]
    if merges_on_steps(task.pipe, caches):
        plans.append(Plan(plans[0].letters, merging="all"))
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for plan in plans:
        for letter, each in _calls(task, prompts, plan):
            seconds[plan.merging, letter].append(each)
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    full = medians["none", "F"]
    shares = {kind: min(time / full, 2.0) for kind, time in medians.items()}
    return Costs(
        cached=shares.get(("none", "C"), 1.0),
        skipped=shares.get(("none", "S"), 0.0),
        cached_merged=shares.get(("all", "C")),
        full_merged=shares.get(("all", "F")),
    )


def merges_on_steps(pipe: Any, caches: bool) -> bool:
    """True if plans may merge: around the layers that a UNet's cached steps run and skip, or in a transformer."""
    model = unwrapped(denoiser_of(pipe))
    return finest_level(model) == 1 if caches else is_known_transformer(model)


def _calls(task: Task, prompts: Sequence[tuple[int, str]], plan: Plan) -> list[tuple[str, float]]:
    """What each call has run, as a letter, and how long, after a run that warms up."""
    times: list[float] = []
    started = 0.0

    def before(model: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal started
        started = now(next(model.parameters()).device)

    def after(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        times.append(now(next(model.parameters()).device) - started)

    denoiser = denoiser_of(task.pipe)
    with switched_on(task.pipe, plan) as report:
        task.pictures(prompts[:1])
        handles = denoiser.register_forward_pre_hook(before), denoiser.register_forward_hook(after)
        try:
            task.pictures(prompts[:1])
        finally:
            for handle in handles:
                handle.remove()
        assert report.cache is not None
        kinds = [step.kind[0].upper() for step in report.cache.steps]
    return list(zip(kinds, times, strict=True))
