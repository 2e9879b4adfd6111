"""Where in a generation a model's call stands: noise level, step and latent size, read from the call itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tomesd_plus.host.noise_level import NoiseLevels
from tomesd_plus.host.seen import SeenCall, same_text
from tomesd_plus.host.timesteps import Place, Schedule, read

MOST_CALLS = 4
"""A step may call the model more than once, with each guidance branch by itself; more calls are of tiles or views."""

NEARER = 0.2
"""By so much a cosine must be larger for latents to follow on the one call rather than on the other."""

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
    """One call of a denoiser or ControlNet.

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
        scheduled: How many timesteps the scheduler has, where these are known.
        last: True at the last of them, which is the first one where they are gone through upwards.
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
    scheduled: int | None = None
    last: bool = False

    @property
    def late(self) -> bool:
        """True if more steps have begun than half of the schedule has: one that ends here is not a failed one.

        Its last timesteps may be another model's, as under ``denoising_end``.
        """
        return self.scheduled is not None and 2 * (self.number + 1) > self.scheduled

    def same_size(self, other: "Step") -> bool:
        """True if latents and batch are as large as another step's."""
        return (self.height, self.width, self.batch) == (other.height, other.width, other.batch)


class StepTracker:
    """Turns the arguments of a model's calls into steps, without waiting for a GPU at each step.

    Pipelines pass the timestep as a view into the scheduler's timesteps. Its storage offset is the step index, and
    the storage is copied to the host once per generation. Of timesteps that a caller makes by itself the values tell.
    A generation goes through either in one direction, down or up, as in DDIM inversion.

    What a call is of, where its place does not tell, its latents and text do. With one call a step in a
    scheduler's timesteps nothing is read from a device for that but at a generation's first step backwards, and at a
    jump: to latents that are nearly at right angles to those before it, no generation jumps. A further call at one
    place is a guidance branch if it has the very tensor of the call before. Else, from the second step on, its latents
    must have the values that those had, unless calls of earlier steps differed likewise, as tiles and views do; other
    latents are those of another generation, which begins where this one has stopped. At a generation's first place,
    where nothing tells how often its steps call, it is a further call too; if the second step then follows on the
    latter rather than on the former, another generation begins there.

    Args:
        noise_levels: Tells the noise level of a timestep.
        explicit: All calls are of one generation: its beginning was said, so none is guessed.

    Attributes:
        branches_alike: Guidance branches have the same latents and text, as those of perturbed attention: what looked
            like a generation before this one was another branch at its first timestep.
    """

    def __init__(self, noise_levels: NoiseLevels | None = None, explicit: bool = False) -> None:
        self.noise_levels = noise_levels or NoiseLevels()
        self.explicit = explicit
        # Replaced as a whole, never changed in place: a copy looks one call ahead.
        self._schedule: Schedule | None = None
        self._place: Place | None = None
        self._direction: int | None = None  # 1 along the schedule or down in timesteps, -1 against; None till it shows
        self._gap: float | None = None  # how far the latest place lies from the one before it
        self._calls: tuple[SeenCall, ...] = ()  # those at the latest place; at most MOST_CALLS are held
        self._calls_before: tuple[SeenCall, ...] = ()  # those at the place before it
        self._repeats = False  # the generation began at the place where the one before had stopped
        self._exactly = False  # and with the same latents and text
        self.branches_alike = False
        self._largest = -math.inf  # of the generation's own timesteps so far
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
        before, schedule = self._place, self._schedule
        latest = None if before is None else before.index
        place, self._schedule = read(timestep, schedule, latest, self.noise_levels)
        new = before is None
        if before is not None and not self.explicit:
            new = self._begins_anew(before, place, sample, text, schedule, timestep)
        ahead = 0.0 if before is None else _ahead(before, place)
        if new or before is None:
            self._begin(sample, text, once_more=before is not None and not ahead and not place.renewed)
        elif ahead:
            self._direction, self._gap = 1 if ahead > 0 else -1, abs(ahead)
            self._number, self._call = self._number + (place.value != before.value), 0
            self._calls, self._calls_before = (), self._calls
        else:
            self._call += 1
        self._place = place
        self._see(sample, text)
        self._ambiguous = self._ambiguous or self._call >= MOST_CALLS
        batch, height, width = len(sample), *sample.shape[-2:]
        return Step(
            place.index, place.value, self._level(place), height, width, batch, self._number, self._call,
            self._ambiguous, new, self._length(place), self._is_last(place),
        )  # fmt: skip

    def _begin(self, sample: Tensor, text: Any, once_more: bool) -> None:
        self.branches_alike = self._exactly and not once_more
        self._repeats = once_more
        self._exactly = once_more and same_text(text, self._calls[0].text) and self._calls[0].latents.equals(sample)
        self._number = self._call = 0
        self._ambiguous, self._direction, self._gap = False, None, None
        self._largest = -math.inf
        self._calls = self._calls_before = ()

    def _level(self, place: Place) -> float:
        if place.index is not None and self._schedule is not None:
            return self._schedule.levels[place.index]
        self._largest = max(place.value, self._largest)
        return self.noise_levels.of([place.value], self._largest)[0]

    def _length(self, place: Place) -> int | None:
        return None if place.index is None or self._schedule is None else len(self._schedule.values)

    def _is_last(self, place: Place) -> bool:
        if place.index is None or self._schedule is None:
            return False
        return place.value == self._schedule.values[0 if self._direction == -1 else -1]  # Heun's calls are both

    def _see(self, sample: Tensor, text: Any) -> None:
        if not self.explicit and self._call < MOST_CALLS:
            self._calls = (*self._calls, SeenCall.of(sample, text, (*self._calls, *self._calls_before)))

    # Whether a generation begins ------------------------------------------------------------------------------------

    def _begins_anew(
        self, before: Place, place: Place, sample: Tensor, text: Any, schedule: Schedule | None, timestep: Any
    ) -> bool:
        ahead = _ahead(before, place)
        if place.renewed and not (
            not self._is_schedulers()
            and before.renewed
            and abs(ahead) == 1
            and self._goes_on(schedule, before)
            and self._calls[0].goes_on(sample, text)
        ):
            return True
        if not ahead:
            return self._is_of_another(place, sample, text, timestep)
        if self._direction is None:
            if self._repeats and (self._exactly or not self._calls[0].latents.is_like(sample)):
                return True
            if self._was_of_another(sample, text):
                return True
            if ahead < 0:  # one that goes up, or the next one's first step
                return not self._calls[0].goes_on(sample, text)
        elif (ahead > 0) != (self._direction > 0):
            return True
        latest = self._calls[0]
        if place.index is None or before.index is None:
            other = not same_text(text, latest.text) and not latest.latents.is_like(sample)
            jumps = self._gap is None or abs(ahead) > 2 * self._gap
        else:
            other, jumps = abs(ahead) > 1 and not same_text(text, latest.text), abs(ahead) > 1
        return other or (jumps and latest.latents.is_unlike(sample))

    def _is_schedulers(self) -> bool:
        """True if the schedule is the pipeline's scheduler's own, which is made anew for each generation only."""
        timesteps = getattr(self.noise_levels.scheduler, "timesteps", None)
        return self._schedule is not None and isinstance(timesteps, Tensor) and self._schedule.holds(timesteps)

    def _goes_on(self, schedule: Schedule | None, before: Place) -> bool:
        """True if the schedule, made anew as by a copy at each step, has what the one before had."""
        now = self._schedule
        if schedule is None or now is None or before.index is None or len(now.values) != len(schedule.values):
            return False
        return now.values[before.index] == before.value

    def _is_of_another(self, place: Place, sample: Tensor, text: Any, timestep: Any) -> bool:
        """True if a further call at the latest place is another generation's first."""
        first, before, number = self._calls[0].latents, self._calls_before, self._call + 1
        if self._direction is not None:
            if self._ambiguous or number >= MOST_CALLS or first.equals(sample):
                return False
            if number >= len(before):
                return True
            return before[number].latents.equals(before[0].latents.copy) and not first.is_like(sample)
        if place.index is not None:
            return False
        # A value by itself has no schedule that would say that there are more steps.
        once_more = isinstance(timestep, Tensor) and timestep.numel() == 1 and not self.branches_alike
        if once_more and same_text(text, self._calls[0].text) and first.equals(sample):
            return True
        return not first.is_like(sample)

    def _was_of_another(self, sample: Tensor, text: Any) -> bool:
        """True if the latest call at a generation's first place, not its first one, turns out to be what goes on."""
        first, last = self._calls[0], self._calls[-1]
        if first is last or self._ambiguous:
            return False
        if not same_text(text, first.text) and same_text(text, last.text):
            return True
        if last.latents is first.latents:
            return False
        return last.latents.likeness(sample) > first.latents.likeness(sample) + NEARER


def _ahead(before: Place, place: Place) -> float:
    """How far a place lies along the schedule from another, in steps, or down in timesteps where these are values."""
    if place.index is not None and before.index is not None:
        return place.index - before.index
    return before.value - place.value
