"""How many tokens go at each level of a step, and the plans that say which; kept for whom they are shared with."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tomesd_plus.host.step import Step
from tomesd_plus.matching import Cells, MergePlan, make_cells, match, max_removed, merge_most_similar
from tomesd_plus.merging.answers import Reason, Why
from tomesd_plus.merging.config import LEVELS, ToMeConfig
from tomesd_plus.merging.generation import Call, Level
from tomesd_plus.schedules import AdaptiveRatio, Schedule


class Planner:
    """Says of a layer's tokens by which plan they are to be merged, or why they are not.

    Another way to say so has the same three methods: see :mod:`tomesd_plus.tomesd`.

    Args:
        config: What similarity is measured on, and who shares plans for how long.
    """

    def __init__(self, config: ToMeConfig) -> None:
        self.config = config
        self.stages: dict[nn.Module, str] = {}  # the block of the UNet that a layer is in, or its own name

    def attach(self, names: Mapping[nn.Module, str]) -> None:
        """Learn the names of a model's modules."""
        self.stages = {module: name.partition(".attentions.")[0] for module, name in names.items()}

    def lay_out(self, call: Call, device: torch.device) -> None:
        """Before a call's first layer: decide what may be removed at each level.

        Args:
            call: Its step is known, whether it is a full one, and whether it is cached.
            device: Of the latents.
        """
        schedules = self.config.cached_schedules if call.cached else self.config.schedules
        if call.full:  # no cells are drawn, unless layers that cached steps skip merge
            schedules = self.config.full_schedules
        generator = None
        if self.config.destinations == "random":
            # By the noise level, not by counting: the same step draws the same cells, whatever ran before it.
            seed = hashlib.sha256(f"{self.config.seed} {call.step.noise_level:.6f}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "big"))
        call.levels = levels_of(call.step, self.config, schedules, generator, device)

    def plan(self, call: Call, hidden_states: Tensor, layer: nn.Module) -> MergePlan | Reason:
        """The plan for a layer's input, or why there is none.

        Args:
            call: The model's call.
            hidden_states: (batch, tokens, channels).
            layer: The attention layer or transformer block.
        """
        tokens = hidden_states.shape[1]
        level = call.levels.get(tokens)
        if level is None:
            return Reason(Why.no_level, (tokens, call.step.height, call.step.width))
        if level.cells is None:
            return level.reason or Reason(Why.nothing_similar)
        return self._kept_or_made(call, hidden_states, level, layer) or Reason(Why.nothing_similar)

    def _kept_or_made(self, call: Call, hidden_states: Tensor, level: Level, layer: nn.Module) -> MergePlan | None:
        if torch.compiler.is_compiling() and self.config.plan_per != "level":
            return self._match(hidden_states, level, layer)  # a graph that knows its layer would serve no other
        wanted = level.ratio if isinstance(level.ratio, AdaptiveRatio) else level.removed
        key = (level.downsample, call.step.call, self._shared_by(layer), wanted)
        plan = call.plans.pop(key, None)  # and put back, so that the last is the latest
        if plan is not None and plan.fits(hidden_states):
            call.plans[key] = plan
            return plan
        if call.too_few.get(key) == hidden_states.shape[:2]:
            return None
        plan = self._match(hidden_states, level, layer)
        if plan is None:
            call.too_few[key] = hidden_states.shape[:2]
        else:
            for other in [other for other in call.plans if other[:3] == key[:3]]:
                del call.plans[other]  # of another ratio
            call.plans[key] = plan
        return plan

    def _shared_by(self, layer: nn.Module) -> nn.Module | str | None:
        if self.config.plan_per == "block":
            return layer
        return self.stages.get(layer, "") if self.config.plan_per == "stage" else None

    def _match(self, hidden_states: Tensor, level: Level, layer: nn.Module) -> MergePlan | None:
        assert level.cells is not None
        cells = level.cells.to(hidden_states.device)  # with a model on several devices not where the latents were
        similarity, best = match(self._metric(hidden_states, layer), cells)
        removed = level.removed
        if isinstance(level.ratio, AdaptiveRatio):
            alike = (similarity >= level.ratio.similarity).sum().item() / similarity.shape[0]  # waits for the device
            removed = level.ratio.removed(cells.tokens, level.removed, alike)
        return merge_most_similar(similarity, best, cells, removed) if removed else None

    def _metric(self, hidden_states: Tensor, attention: Any) -> Tensor:
        if self.config.metric != "keys":
            return hidden_states.detach()
        with torch.no_grad():
            keys = attention.to_k(hidden_states)  # (batch, tokens, heads · channels)
            return keys.unflatten(-1, (attention.heads, -1)).mean(dim=2)


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
            reason = Reason(Why.level_off, (downsample,))
        elif not most:
            reason = Reason(Why.no_cell, (height, width))
        elif ratio:
            reason = Reason(Why.ratio_too_small, (height * width,))
        else:
            reason = Reason(Why.ratio_zero)
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
