"""How far forecasts of skipped and cached steps lie from what was recorded; pure functions of tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from tomesd_plus.caching.outputs import NEAR, lagrange
from tomesd_plus.tuning.plans import Plan


@dataclass(frozen=True, eq=False)
class Errors:
    """Errors of forecasts along one recorded way, and what each does to the picture.

    Args:
        outputs: The denoiser's guided output at each step, (steps, prompts, values).
        features: What cached steps would take, likewise; ``None`` if there are no cached steps.
        sensitivity: Squared error of a cached step's output for each squared error of what it takes, (steps, prompts).
        gains: Squared error of the picture for each squared error of a step's output, (steps, prompts).
        weights: Of each prompt in a sum, (prompts,).
    """

    outputs: Tensor
    features: Tensor | None
    sensitivity: Tensor | None
    gains: Tensor
    weights: Tensor

    skipped: Callable[..., float] = field(init=False)
    cached: Callable[..., float] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "skipped", cache(self._skipped))  # the same are asked for again and again
        object.__setattr__(self, "cached", cache(self._cached))

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.outputs)

    def _skipped(self, before: tuple[int, ...], step: int, order: int | None) -> float:
        """What skipping a step does to the picture, in squared error.

        Args:
            before: The up to three latest steps that ran, the latest last.
            step: The skipped one.
            order: As in :class:`~tomesd_plus.FeatureCacheConfig`.
        """
        if order is None:
            gaps = [late - early for early, late in zip(before, [*before[1:], step])]
            order = 2 if max(gaps) <= NEAR else 1
        places = before[-order - 1 :]
        error = _along(self.outputs, places, step) - self.outputs[step]
        return float((error.square().mean(-1) * self.gains[step] * self.weights).sum())

    def _cached(self, before: int | None, full: int, step: int, forecast: float) -> float:
        """What a cached step does to the picture, in squared error.

        Args:
            before, full: The latest two full steps.
            step: The cached one.
            forecast: How far it follows their trend.
        """
        assert self.features is not None and self.sensitivity is not None
        taken = self.features[full]
        if before is not None and forecast:
            ahead = forecast * min(1.0, (step - full) / (full - before))
            taken = taken + ahead * (taken - self.features[before])
        error = (taken - self.features[step]).square().mean(-1) * self.sensitivity[step]
        return float((error * self.gains[step] * self.weights).sum())

    def of(self, plan: Plan) -> float:
        """What a whole plan does to the picture, if its errors add up."""
        full: list[int] = []
        ran: tuple[int, ...] = ()
        total = 0.0
        for step, letter in enumerate(plan.letters):
            if letter == "F" or not ran:
                full.append(step)
            elif letter == "C":
                total += self.cached(full[-2] if len(full) > 1 else None, full[-1], step, plan.forecast)
            else:
                total += self.skipped(ran, step, plan.order)
                continue
            ran = (*ran, step)[-3:]
        return total


def _along(outputs: Tensor, places: Sequence[int], step: int) -> Tensor:
    weights = torch.tensor(lagrange(places, step), dtype=outputs.dtype)
    return torch.einsum("s,spv->pv", weights, outputs[list(places)])
