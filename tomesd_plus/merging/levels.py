"""What holds for all layers of one resolution in one step: how many tokens to remove, and the cells."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from tomesd_plus.host.step import Step
from tomesd_plus.matching import Cells, make_cells, max_removed
from tomesd_plus.merging.config import LEVELS, ToMeConfig
from tomesd_plus.schedules import AdaptiveRatio, Schedule


@dataclass(frozen=True)
class Level:
    """A resolution in one step.

    Args:
        downsample: 1, 2, 4 or 8.
        height, width: Tokens.
        removed: Tokens to remove from each sample; with an adaptive ratio the most that may be.
        cells: Sources and destinations; ``None`` if nothing is removed.
        ratio: What decided that; ``None`` if the configuration leaves the level alone.
        reason: Why nothing is removed.
    """

    downsample: int
    height: int
    width: int
    removed: int = 0
    cells: Cells | None = None
    ratio: Schedule | AdaptiveRatio | None = None
    reason: str | None = None


def levels_of(
    step: Step,
    config: ToMeConfig,
    schedules: Mapping[int, Schedule | AdaptiveRatio],
    generator: torch.Generator | None,
    device: torch.device,
) -> dict[int, Level]:
    """The levels of a step by their number of tokens. Of two with the same number the finer counts.

    Args:
        step: The step.
        config: What to merge.
        schedules: Its schedules for the kind of step.
        generator: For random destinations.
        device: Where cells are wanted.
    """
    levels: dict[int, Level] = {}
    for downsample in LEVELS:
        height, width = -(-step.height // downsample), -(-step.width // downsample)
        if height * width in levels:
            continue
        schedule = schedules.get(downsample)
        most = max_removed(height, width, config.cell_size)
        ratio, removed = 0.0, 0
        if schedule is not None:
            ratio = max(schedule.ratios) if isinstance(schedule, AdaptiveRatio) else schedule(step.noise_level)
            removed = min(int(height * width * ratio), most)
        cells = reason = None
        if removed:
            cells = _cells(height, width, config.cell_size, config.window, generator, device)
        elif schedule is None:
            reason = f"level {downsample} is not merged by the configuration"
        elif not most:
            reason = f"no cell fits in {height} × {width} tokens"
        elif ratio:
            reason = f"the ratio is less than one of {height * width} tokens"
        else:
            reason = "the ratio is 0 at this noise level"
        levels[height * width] = Level(downsample, height, width, removed, cells, schedule, reason)
    return levels


def _cells(
    height: int,
    width: int,
    cell_size: tuple[int, int],
    window: int | None,
    generator: torch.Generator | None,
    device: torch.device,
) -> Cells:
    if generator is None:
        return _fixed_cells(height, width, cell_size, window, device)
    return make_cells(height, width, cell_size, window, generator, device)


@lru_cache(maxsize=16)
def _fixed_cells(
    height: int, width: int, cell_size: tuple[int, int], window: int | None, device: torch.device
) -> Cells:
    """Those without random numbers are the same at every step."""
    return make_cells(height, width, cell_size, window, None, device)
