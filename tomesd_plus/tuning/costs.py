"""What steps cost, measured on the pipeline at hand."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from tomesd_plus.host.clock import now
from tomesd_plus.host.models import denoiser_of, finest_level, unwrapped
from tomesd_plus.host.transformers import is_known_transformer
from tomesd_plus.tuning.pictures import Task, switched_on
from tomesd_plus.tuning.plans import Costs, Plan

PATTERNS = 3
"""How often a generation repeats the pattern of steps."""
ROUNDS = 3
"""Generations with merging, and as many without."""


def measured_costs(task: Task, prompts: Sequence[tuple[int, str]], caches: bool) -> Costs:
    """Times of the denoiser's calls of each kind, as shares of a full one's.

    Generations with and without merging take turns, and of each kind the fastest call counts: whatever else the
    machine does, and warming up, only add to a time.

    Args:
        task: What is generated.
        prompts: Those to generate, with their numbers; the first is.
        caches: The model has layers that cached steps skip.
    """
    pattern = "FFCS" if caches else "FFS"
    plans = [Plan(("F" + pattern * PATTERNS)[: max(4, task.steps)])]
    if merges_on_steps(task.pipe, caches):
        plans.append(Plan(plans[0].letters, merging="all"))
    fastest: dict[tuple[str, str], float] = {}
    for _ in range(ROUNDS):
        for plan in plans:
            for letter, seconds in _calls(task, prompts, plan):
                kind = plan.merging, letter
                fastest[kind] = min(seconds, fastest.get(kind, seconds))
    full = fastest["none", "F"]
    shares = {kind: min(seconds / full, 2.0) for kind, seconds in fastest.items()}
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
    """What each call of a generation has run, as a letter, and how long."""
    times: list[float] = []
    started = 0.0

    def before(model: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal started
        started = now(next(model.parameters()).device)

    def after(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        times.append(now(next(model.parameters()).device) - started)

    denoiser = denoiser_of(task.pipe)
    with switched_on(task.pipe, plan) as report:
        handles = denoiser.register_forward_pre_hook(before), denoiser.register_forward_hook(after)
        try:
            task.pictures(prompts[:1])
        finally:
            for handle in handles:
                handle.remove()
        assert report.cache is not None
        kinds = [step.kind[0].upper() for step in report.cache.steps]
    return list(zip(kinds, times, strict=True))
