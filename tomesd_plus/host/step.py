"""Where in a generation a model's call stands: noise level, step and latent size, read from the call itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tomesd_plus.host.noise_level import NoiseLevels

MOST_CALLS = 4
"""A step may call the model more than once, with each guidance branch by itself; more calls are of tiles or views."""

_WHY_OUTSIDE = "token merging and caching choose at each step what runs: remove them before an export"

Hook = TypeVar("Hook", bound=Callable[..., None])


def outside_graphs(hook: Hook) -> Hook:
    """Keep a hook that reads the host's values out of the graphs of ``torch.compile``."""
    try:
        disabled = torch.compiler.disable(hook, reason=_WHY_OUTSIDE)
    except TypeError:  # torch 2.6 takes no reason
        disabled = torch.compiler.disable(hook)
    return cast(Hook, disabled)


def refuse_tracing(what: str, *tensors: Any) -> None:
    """Refuse to be recorded once and for all: what is done differs from step to step.

    Args:
        what: The subject of the message.
        tensors: The call's arguments; an export, which runs as Python, gives fake ones.

    Raises:
        RuntimeError: The model is being traced or exported.
    """
    if torch._C._get_tracing_state() is not None or any(isinstance(each, FakeTensor) for each in tensors):
        raise RuntimeError(
            f"{what} cannot be traced or exported: what runs differs from step to step. Remove it for the export, or "
            "use torch.compile, which works with it"
        )


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
        last: True at the last of the scheduler's timesteps, where these are known.
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
    last: bool = False

    def same_size(self, other: "Step") -> bool:
        """True if latents and batch are as large as another step's."""
        return (self.height, self.width, self.batch) == (other.height, other.width, other.batch)


class StepTracker:
    """Turns the arguments of a UNet's calls into steps, without waiting for a GPU at each step.

    Pipelines pass the timestep as a view into the scheduler's timesteps. Its storage offset is the step index, and
    the storage is copied to the host once per generation. Of timesteps that a caller makes by itself the values tell,
    in either direction: a generation's fall, or rise as in DDIM inversion.

    Args:
        noise_levels: Tells the noise level of a timestep.
        explicit: All calls are of one generation: its beginning was said, so none is guessed from the timesteps.
    """

    _storage: Tensor | None  # the scheduler's timesteps of the generation under way
    _version: int | None
    _values: list[float]  # the same on the host
    _levels: list[float]  # their noise levels
    _index: int | None
    _last: float | None
    _last_index: int | None
    _rising: bool | None  # the direction of a caller's own timesteps; None until it shows
    _sample: tuple[Tensor, int | None] | None  # the latest step's latents, of a caller's own timesteps, and text
    _text: Any
    _largest: float  # of the generation's own timesteps so far
    _number: int
    _call: int
    _ambiguous: bool

    def __init__(self, noise_levels: NoiseLevels | None = None, explicit: bool = False) -> None:
        self.noise_levels = noise_levels or NoiseLevels()
        self.explicit = explicit
        self._storage = None
        self._version = None
        self._values, self._levels = [], []
        self._index = self._last = self._last_index = None
        self._rising = self._sample = self._text = None
        self._largest = -math.inf
        self._number = self._call = 0
        self._ambiguous = False

    def observe(self, sample: Tensor, timestep: Tensor | float | int, text: Any = None) -> Step:
        """Read a call's latents, timestep and text.

        Args:
            sample: (batch, channels, height, width), or of a video (batch, channels, frames, height, width).
            timestep: A number, 0-d, or one a sample.
            text: (batch, tokens, channels), what cross-attention sees: with another one, a jump in the schedule is
                the beginning of another generation.
        """
        if isinstance(timestep, Tensor) and _is_one_of_many(timestep):
            index, new = self._observe_view(timestep, text)
            value, noise_level = self._values[index], self._levels[index]
        else:
            index = None
            value = float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)
            again = isinstance(timestep, Tensor) and timestep.numel() == 1 and value == self._last
            again = again and _same_text(text, self._text) and _is_same(sample, self._sample)
            new = again or self._begins_anew(value, sample, text)  # again: a schedule of one step, once more
            self._largest = value if new else max(value, self._largest)
            (noise_level,) = self.noise_levels.of([value], self._largest)
        new = self._last is None if self.explicit else new
        if new:
            self._number = self._call = 0
            self._ambiguous, self._rising = False, None
        elif value != self._last:
            self._number, self._call = self._number + 1, 0
            self._rising = self._last is not None and value > self._last
        else:
            self._call = self._call + 1 if index == self._last_index else 0
        if self._call == 0:
            self._text = text.detach() if isinstance(text, Tensor) else text  # else it would keep an encoder's graph
            self._sample = (sample.detach(), _version(sample)) if index is None else None
        self._last, self._last_index = value, index
        self._ambiguous = self._ambiguous or self._call >= MOST_CALLS
        batch, height, width = len(sample), *sample.shape[-2:]
        last = index is not None and index == len(self._values) - 1
        return Step(
            index, value, noise_level, height, width, batch, self._number, self._call, self._ambiguous, new, last
        )

    def _observe_view(self, timestep: Tensor, text: Any) -> tuple[int, bool]:
        index = int(timestep.storage_offset())
        pointer = timestep.untyped_storage().data_ptr()
        version = _version(timestep)
        new = self._storage is None or self._storage.data_ptr() != pointer or self._version != version
        if new:
            # Held, so that its memory cannot become another schedule's and be taken for this one.
            self._storage = torch.as_strided(timestep.detach(), (_storage_elements(timestep),), (1,), 0)
            self._version = version
            self._values = [float(value) for value in self._storage.tolist()]
            self._levels = self.noise_levels.of(self._values)
        new = new or self._index is None or index < self._index
        new = new or (index > cast(int, self._index) + 1 and not _same_text(text, self._text))
        self._index = index
        return index, new

    def _begins_anew(self, value: float, sample: Tensor, text: Any) -> bool:
        """True if a timestep of the caller's own is another generation's first."""
        if self._last is None:
            return True
        if value == self._last:  # one of guidance's branches, which see the same latents
            return not _is_like(sample, self._sample)
        rises = value > self._last
        if self._rising is not None and rises != self._rising:
            return True
        if rises and self._rising is None:  # one that has begun to rise, or the next one's first step
            return not (_same_text(text, self._text) and _is_like(sample, self._sample))
        return not _same_text(text, self._text) and not _is_like(sample, self._sample)


def _is_one_of_many(timestep: Tensor) -> bool:
    """True for an entry of a longer tensor, as it is or expanded to the batch."""
    one = timestep.ndim == 0 or timestep.numel() == 1 or timestep.stride(0) == 0
    return one and _storage_elements(timestep) > 1


def _storage_elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _same_text(text: Any, other: Any) -> bool:
    """False if what two calls attend to is known to differ; without one of guidance's branches it is the same."""
    if text is other or not (isinstance(text, Tensor) and isinstance(other, Tensor)):
        return True
    if text.shape[1:] != other.shape[1:]:
        return False
    return text.shape != other.shape or bool(torch.equal(text, other.to(text)))


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _is_same(sample: Tensor, other: tuple[Tensor, int | None] | None) -> bool:
    return other is not None and sample.shape == other[0].shape and bool(torch.equal(sample, other[0].to(sample)))


def _is_like(sample: Tensor, before: tuple[Tensor, int | None] | None) -> bool:
    """True for two successive latents of one generation; those of two pictures are nearly at right angles."""
    if before is None or sample.shape != before[0].shape:
        return False
    other, version = before
    if sample.data_ptr() == other.data_ptr() and sample.dtype == other.dtype:
        return version == _version(sample)  # written over: what it was cannot be told
    one, two = (each.detach().flatten().float() for each in (sample, other.to(sample)))
    return bool(torch.cosine_similarity(one, two, dim=0) > 0.8)
