"""A timestep as a call is given it: a view into a schedule, whose place tells all, or a value of the caller's own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tomesd_plus.host.noise_level import NoiseLevels
from tomesd_plus.host.seen import version_of


@dataclass(frozen=True, eq=False)
class Schedule:
    """The memory that a timestep is a view into.

    Args:
        storage: All of it; held, so that its memory cannot become another schedule's and be taken for this one.
        version: Counts what is written to it.
        values: On the host.
        levels: Their noise levels.
        by_value: It is no schedule: its entries are all one timestep, as of a batch that is cut into pieces, or one
            entry is written over for each step, as of loops with static buffers.
    """

    storage: Tensor
    version: int | None
    values: tuple[float, ...]
    levels: tuple[float, ...]
    by_value: bool

    @classmethod
    def of(cls, timestep: Tensor, noise_levels: NoiseLevels, slot: bool = False) -> "Schedule":
        """Read the memory of a timestep; this waits for its device."""
        storage = torch.as_strided(timestep.detach(), (_storage_elements(timestep),), (1,), 0)
        values = [float(value) for value in storage.tolist()]
        by_value = slot or len(set(values)) == 1
        levels = () if by_value else tuple(noise_levels.of(values))
        return cls(storage, version_of(timestep), tuple(values), levels, by_value)

    def holds(self, timestep: Tensor) -> bool:
        """True if a timestep is a view into this memory."""
        return share_memory(self.storage, timestep)

    def unwritten(self, timestep: Tensor) -> bool:
        """True if nothing was written to it since it was read."""
        return self.version == version_of(timestep)


@dataclass(frozen=True)
class Place:
    """Where a call stands.

    Args:
        index: In the scheduler's timesteps; ``None`` if the caller passed a timestep of its own.
        value: The timestep.
        renewed: The schedule was made or written to after the call before.
    """

    index: int | None
    value: float
    renewed: bool = False


def read(timestep: Any, schedule: Schedule | None, latest: int | None, levels: NoiseLevels) -> tuple[Place, Any]:
    """Where a call stands, and its schedule, read anew where it has to be.

    Args:
        timestep: A number, or a tensor of any kind.
        schedule: Of the call before.
        latest: The index of the call before.
        levels: Tells the noise levels of timesteps.
    """
    if not isinstance(timestep, Tensor):
        return Place(None, float(timestep)), schedule
    if not _is_one_of_many(timestep):
        return Place(None, float(timestep.reshape(-1)[0])), schedule
    index = int(timestep.storage_offset())
    if schedule is None or not schedule.holds(timestep):
        schedule, renewed = Schedule.of(timestep, levels), True
    elif schedule.by_value:
        renewed = False
    elif schedule.version is None:  # then writing cannot be seen, so its entry is looked at where it comes again
        renewed = False
        if index == latest and float(timestep.reshape(-1)[0]) != schedule.values[index]:
            schedule = Schedule.of(timestep, levels, slot=True)
    elif renewed := not schedule.unwritten(timestep):
        schedule = Schedule.of(timestep, levels, slot=index == latest)
    if schedule.by_value:
        return Place(None, float(timestep.reshape(-1)[0])), schedule
    return Place(index, schedule.values[index], renewed), schedule


def _is_one_of_many(timestep: Tensor) -> bool:
    """True for an entry of a longer tensor, as it is or expanded to the batch."""
    one = timestep.ndim == 0 or timestep.numel() == 1 or timestep.stride(0) == 0
    return one and _storage_elements(timestep) > 1


def share_memory(one: Tensor, other: Tensor) -> bool:
    """True if both are views into the same memory, as timesteps are into a scheduler's."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _storage_elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()
