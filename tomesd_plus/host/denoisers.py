"""How the calls of a pipeline's denoiser are read, and their noise levels: the one place that decides it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from tomesd_plus.host.models import denoiser_of, unwrapped
from tomesd_plus.host.noise_level import NoiseLevels
from tomesd_plus.host.reading import Reading, read_unet
from tomesd_plus.host.transformers import TransformerReader, is_known_transformer, matches_flows

Read = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Reading]
"""Reads a model's call, as a forward pre-hook with keyword arguments is given it."""


def reader_of(pipe: Any) -> Read:
    """What reads the calls of a pipeline's denoiser, or of one ControlNet that feeds it; a new one for each follower.

    A transformer that is not known is read like a UNet, by its arguments' names: the value of a timestep that is no
    view into the scheduler's is then fetched from the device at each call.

    Args:
        pipe: The pipeline, or the denoiser by itself.

    Raises:
        TypeError: It has no denoiser.
    """
    return TransformerReader(pipe) if is_known_transformer(unwrapped(denoiser_of(pipe))) else read_unet


def noise_levels_of(pipe: Any, needed: bool = True) -> NoiseLevels:
    """What tells the noise levels of the calls that :func:`reader_of` reads.

    Args:
        pipe: The pipeline, or the denoiser by itself.
        needed: As :class:`~tomesd_plus.host.noise_level.NoiseLevels` takes it.
    """
    model = unwrapped(denoiser_of(pipe))
    return NoiseLevels(pipe, needed, flow=is_known_transformer(model) and matches_flows(model))
