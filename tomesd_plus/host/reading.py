"""What a model's call says before the model runs."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tomesd_plus.host.arguments import call_of


@dataclass(frozen=True)
class Reading:
    """The arguments that a step is read off.

    Args:
        sample: A tensor of which the batch, and in its last two dimensions the grid's height and width, count: a
            UNet's latents, or of a transformer a view with a place for each token.
        timestep: As :meth:`~tomesd_plus.host.step.StepTracker.observe` takes it.
        text: What is attended to besides, (batch, tokens, channels).
        text_tokens: How many of them go through a transformer's blocks.
        obstacle: Why nothing can be merged in this call.
        between: Why tokens cannot stay merged from one block to the next.
    """

    sample: Tensor
    timestep: Any
    text: Any = None
    text_tokens: int = 0
    obstacle: str | None = None
    between: str | None = None


def read_unet(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
    """Read a UNet's or ControlNet's call, as a forward pre-hook with keyword arguments is given it."""
    sample, timestep, text = call_of(model, args, kwargs)
    return Reading(sample, timestep, text)
