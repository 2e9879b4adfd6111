"""Where in a generation a model's call stands: noise level, step and latent size, read from the call itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

MOST_CALLS = 4
"""A step may call the model more than once, with each guidance branch by itself; more calls are of tiles or views."""

Hook = TypeVar("Hook", bound=Callable[..., None])


def outside_graphs(hook: Hook) -> Hook:
    """Keep a hook that reads the host's values out of the graphs of ``torch.compile``."""
    return cast(Hook, torch.compiler.disable(hook))


@dataclass(frozen=True)
class Step:
    """One call of a UNet.

    Args:
        index: Place in the scheduler's timesteps; ``None`` if the caller passed a timestep of its own.
        timestep: As the model is given it; some schedulers' are fractions, or lie below 0.
        noise_level: 1 at the first, noisiest timestep of training, 0 at the last, and never beyond.
        height, width: Size of the latents.
        batch: Batch size, both guidance branches counted.
        number: Of the step in its generation, from 0; calls at one timestep are one step.
        call: Of this call among those at the step's place in the schedule, from 0: a guider may call once a branch.
        ambiguous: True from the step on in which a generation has more than :data:`MOST_CALLS` calls at one place in
            the schedule: tiles or views need not come in the same order at every step, so what one of them leaves is
            of no use to another. Nothing is then carried from one call to the next.
        new_generation: True if this is the first call of a generation.
    """

    index: int | None
    timestep: float
    noise_level: float
    height: int
    width: int
    batch: int
    number: int
    call: int
    ambiguous: bool
    new_generation: bool

    def same_size(self, other: "Step") -> bool:
        """True if latents and batch are as large as another step's."""
        return (self.height, self.width, self.batch) == (other.height, other.width, other.batch)


class StepTracker:
    """Turns the arguments of a UNet's calls into steps, without waiting for a GPU at each step.

    Pipelines pass the timestep as a view into the scheduler's timesteps. Its storage offset is the step index, and
    the storage is copied to the host once per generation.

    Args:
        train_timesteps: Timesteps of training; the timestep ``train_timesteps - 1`` is noise level 1.
        explicit: All calls are of one generation: its beginning was said, so none is guessed from the timesteps.
    """

    _storage: Tensor | None  # the scheduler's timesteps of the generation under way
    _version: int | None
    _values: list[float]  # the same on the host
    _index: int | None
    _last: float | None
    _last_index: int | None
    _number: int
    _call: int
    _ambiguous: bool

    def __init__(self, train_timesteps: int = 1000, explicit: bool = False) -> None:
        self.train_timesteps = train_timesteps
        self.explicit = explicit
        self._storage = None
        self._version = None
        self._values = []
        self._index = None
        self._last = None
        self._last_index = None
        self._number = self._call = 0
        self._ambiguous = False

    def observe(self, sample: Tensor, timestep: Tensor | float | int) -> Step:
        """Read a call's latents and timestep.

        Args:
            sample: (batch, channels, height, width), or of a video (batch, channels, frames, height, width).
            timestep: A number, 0-d, or one a sample.
        """
        if isinstance(timestep, Tensor) and _is_one_of_many(timestep):
            index, value, new = self._observe_view(timestep)
        else:
            index = None
            value = float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)
            new = self._last is None or value > self._last
            if isinstance(timestep, Tensor) and timestep.numel() == 1:
                new = new or value == self._last  # the one timestep of a schedule of one step, again
        new = self._last is None if self.explicit else new
        if new:
            self._number = self._call = 0
            self._ambiguous = False
        elif value != self._last:
            self._number, self._call = self._number + 1, 0
        else:
            self._call = self._call + 1 if index == self._last_index else 0
        self._last, self._last_index = value, index
        self._ambiguous = self._ambiguous or self._call >= MOST_CALLS
        noise_level = min(max(value / (self.train_timesteps - 1), 0.0), 1.0)
        batch, height, width = len(sample), *sample.shape[-2:]
        return Step(index, value, noise_level, height, width, batch, self._number, self._call, self._ambiguous, new)

    def _observe_view(self, timestep: Tensor) -> tuple[int, float, bool]:
        index = int(timestep.storage_offset())
        pointer = timestep.untyped_storage().data_ptr()
        version = None if timestep.is_inference() else timestep._version
        new = self._storage is None or self._storage.data_ptr() != pointer or self._version != version
        if new:
            # Held, so that its memory cannot become another schedule's and be taken for this one.
            self._storage = torch.as_strided(timestep.detach(), (_storage_elements(timestep),), (1,), 0)
            self._version = version
            self._values = [float(value) for value in self._storage.tolist()]
        new = new or self._index is None or index < self._index
        self._index = index
        return index, self._values[index], new


def _is_one_of_many(timestep: Tensor) -> bool:
    """True for an entry of a longer tensor, as it is or expanded to the batch."""
    one = timestep.ndim == 0 or timestep.numel() == 1 or timestep.stride(0) == 0
    return one and _storage_elements(timestep) > 1


def _storage_elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()
