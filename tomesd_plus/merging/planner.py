"""Makes the plans of one model, and keeps them for the blocks and steps that share them."""

from typing import Any

import torch
from torch import Tensor, nn

from tomesd_plus.host.step import MOST_CALLS, Step
from tomesd_plus.matching import MergePlan, match, merge_most_similar
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.levels import Level
from tomesd_plus.schedules import AdaptiveRatio

Key = tuple[int, int, nn.Module | str | None, int | AdaptiveRatio]
"""Downsample, the number of the call in its step, what shares a plan, and how many tokens are to be removed."""


class Planner:
    """Makes a plan where none is kept that holds.

    Args:
        config: What similarity is measured on, and who shares plans for how long.
    """

    plans: dict[Key, MergePlan]
    stages: dict[nn.Module, str]  # the block of the UNet that a layer is in, or its own name
    _steps: dict[int, Step]  # the latest of each call of a step
    _too_many: bool  # of the generation's calls are at one step: they can no longer be told apart, so no plan lasts
    _too_few: dict[Key, torch.Size]  # where an adaptive ratio found too few tokens alike, in (batch, tokens)

    def __init__(self, config: ToMeConfig) -> None:
        self.config = config
        self.stages = {}
        self.call = 0
        self._too_many = False
        self.forget()

    def forget(self) -> None:
        """Drop all plans."""
        self.plans = {}
        self._too_few = {}
        self._steps = {}

    def begin_step(self, step: Step, before: Step | None, cached: bool = False) -> None:
        """Drop plans that do not hold for a step any more, which may be a feature cache's cached one."""
        self.call = step.call
        self._too_many = step.call >= MOST_CALLS or (self._too_many and not step.new_generation)
        if before is None or step.new_generation or self._too_many or not self._lasts(step, before, cached):
            self.forget()
        last = self._steps.get(step.call)  # guidance branches may come as calls of their own, of unlike batch
        if last is not None and not step.same_size(last):
            self.plans = {key: plan for key, plan in self.plans.items() if key[1] != step.call}
            self._too_few = {key: size for key, size in self._too_few.items() if key[1] != step.call}
        self._steps[step.call] = step

    def _lasts(self, step: Step, before: Step, cached: bool) -> bool:
        every = self.config.plan_every
        if every == "full":
            return cached or (step.number == before.number and step.call > before.call)
        return every > 1 and step.number // every == before.number // every

    def plan(self, hidden_states: Tensor, level: Level, layer: nn.Module) -> MergePlan | None:
        """The plan for a layer's input.

        Args:
            hidden_states: (batch, tokens, channels).
            level: Its level, with something to remove.
            layer: The attention layer or transformer block.

        Returns:
            ``None`` if an adaptive ratio finds too few tokens alike.
        """
        if torch.compiler.is_compiling() and self.config.plan_per != "level":
            return self._match(hidden_states, level, layer)  # a graph that knows its layer would serve no other
        wanted = level.ratio if isinstance(level.ratio, AdaptiveRatio) else level.removed
        key = (level.downsample, self.call, self._shared_by(layer), wanted)
        plan = self.plans.pop(key, None)  # and put back, so that the last is the latest
        if plan is not None and plan.fits(hidden_states):
            self.plans[key] = plan
            return plan
        if self._too_few.get(key) == hidden_states.shape[:2]:
            return None
        plan = self._match(hidden_states, level, layer)
        if plan is None:
            self._too_few[key] = hidden_states.shape[:2]
        else:
            for other in [other for other in self.plans if other[:3] == key[:3]]:
                del self.plans[other]  # of another ratio
            self.plans[key] = plan
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}, "_too_few": {}}
