"""What full steps leave, and what is taken from it on the steps between."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tomesd_plus.host.step import Step


@dataclass
class Features:
    """What a full step left.

    Args:
        step: Which step it was.
        outputs: The skipped layers' outputs by name.
        early: The early feature of an adaptive cache.
        before: What the full step before it left, at another noise level; ``None`` if there is no trend to follow.
    """

    step: Step
    outputs: dict[str, Any] = field(default_factory=dict)
    early: Tensor | None = None
    before: "Features | None" = None

    def ahead(self, step: Step, forecast: float) -> float:
        """How far a later step follows the trend, as a share of the way between the two full steps."""
        if self.before is None:
            return 0.0
        age, gap = step.number - self.step.number, self.step.number - self.before.step.number
        return forecast * min(1.0, age / gap)

    def forecast(self, boundary: tuple[str, ...], ahead: float) -> dict[str, Any]:
        """The outputs that a later step takes.

        Args:
            boundary: The layers whose outputs are used; those of others are nobody's input.
            ahead: As :meth:`ahead` tells.
        """
        if self.before is None or not ahead:
            return self.outputs
        first, second = self.before.outputs, self.outputs
        return second | {name: extrapolate(first[name], second[name], ahead) for name in boundary}

    def bytes(self, boundary: tuple[str, ...]) -> int:
        """Memory that is held, both steps' counted."""
        tensors = [] if self.early is None else [self.early]
        for name in boundary:
            output = self.outputs.get(name, ())
            tensors += output if isinstance(output, tuple) else [output]
        own = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return own + (0 if self.before is None else self.before.bytes(boundary))


def extrapolate(first: Any, second: Any, ahead: float) -> Any:
    """Go on from the second of two outputs by a share of the way between them; the second if they are not alike.

    Args:
        first, second: Tensors of one shape, or tuples of such.
        ahead: 0 is the second; 1 is as far from it as that is from the first.

    Example:
        >>> extrapolate(torch.tensor([1.0]), torch.tensor([2.0]), 0.5)
        tensor([2.5000])
    """
    if isinstance(first, tuple):
        return tuple(extrapolate(one, other, ahead) for one, other in zip(first, second, strict=True))
    if (first.dtype, first.device) != (second.dtype, second.device):  # the caller has moved the model in mid-run
        return second
    return torch.lerp(first, second, 1 + ahead)
