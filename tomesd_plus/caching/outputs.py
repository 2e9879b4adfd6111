"""What whole calls of a denoiser have given, and the forecast of one that is skipped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from tomesd_plus.host.step import Step

MOST_KEPT = 3
"""Outputs that are kept: as many as a parabola goes through."""
NEAR = 2
"""Steps apart at which a parabola is the closer forecast, and beyond which a straight line is."""


@dataclass(frozen=True, eq=False)
class Output:
    """What a call has given.

    Args:
        step: Which step it was of.
        value: As the model gave it: a tensor, a tuple, a list, or one of diffusers' outputs of such.
        as_dict: What the call's ``return_dict`` asked for.
    """

    step: Step
    value: Any
    as_dict: bool


def map_tensors(change: Callable[[list[Tensor]], Tensor], *outputs: Any) -> Any:
    """An output of the same form whose tensors are a function of those in several outputs of one form.

    Example:
        >>> map_tensors(lambda pair: pair[0] + pair[1], (torch.ones(1), None), (torch.ones(1), None))
        (tensor([2.]), None)
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        return change(list(outputs))
    if isinstance(first, BaseOutput):
        return type(first)(**{key: map_tensors(change, *(each[key] for each in outputs)) for key in first})
    if isinstance(first, (tuple, list)):
        return type(first)(map_tensors(change, *parts) for parts in zip(*outputs, strict=True))
    return first


def kept_with(kept: Sequence[Output], new: Output, most: int = MOST_KEPT) -> list[Output]:
    """The outputs to go on from after a call: it and those of steps before it with latents and batch of its size."""
    before = [each for each in kept if each.step.number < new.step.number and each.step.same_size(new.step)]
    return [*before, new][-most:]


def forecast(kept: Sequence[Output], number: int, order: int | None = None) -> Any:
    """The output of a later step, along the curve through the latest ones in the number of the step.

    Along a straight line it is the predictor of ZEUS (2026) without its reuse.

    Args:
        kept: One to three outputs of different steps, the latest last.
        number: Of the step.
        order: 1 for a straight line, 2 for a parabola; ``None``: a parabola where the steps lie at most two apart.
    """
    numbers = [each.step.number for each in kept]
    if order is None:
        gaps = [late - early for early, late in zip(numbers, [*numbers[1:], number])]
        order = 2 if max(gaps, default=0) <= NEAR else 1
    places = numbers[-order - 1 :]

    def along(tensors: list[Tensor]) -> Tensor:
        latest = tensors[-1]
        if any((each.dtype, each.device) != (latest.dtype, latest.device) for each in tensors):
            return latest.clone()  # the caller has moved the model in mid-run
        weights = lagrange(places, number)
        ahead = latest * weights[-1]
        for tensor, weight in zip(tensors[:-1], weights):
            ahead = torch.add(ahead, tensor, alpha=weight)
        return ahead

    return map_tensors(along, *(each.value for each in kept[-order - 1 :]))


def lagrange(places: Sequence[float], at: float) -> list[float]:
    """The weights of values at different places in the polynomial through them, taken at another place.

    Example:
        >>> lagrange([0, 2], 3)
        [-0.5, 1.5]
    """
    weights = []
    for place in places:
        weight = 1.0
        for other in places:
            if other != place:
                weight *= (at - other) / (place - other)
        weights.append(weight)
    return weights


def bytes_of(output: Any) -> int:
    """Memory that an output's tensors hold."""
    total = 0

    def count(tensors: list[Tensor]) -> Tensor:
        nonlocal total
        total += tensors[0].untyped_storage().nbytes()
        return tensors[0]

    map_tensors(count, output)
    return total
