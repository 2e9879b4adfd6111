"""Makes the plans of one model, and keeps them for the blocks and steps that share them."""

from typing import Any

import torch
from torch import Tensor, nn

from tomesd_plus.config import ToMeConfig
from tomesd_plus.levels import Level
from tomesd_plus.matching import match, merge_most_similar
from tomesd_plus.plan import MergePlan
from tomesd_plus.schedule import AdaptiveRatio
from tomesd_plus.step import Step


class Planner:
    """Makes a plan where none is kept that holds.

    Args:
        config: What similarity is measured on, and who shares plans for how long.
    """

    plans: dict[tuple[int, nn.Module | str | None], MergePlan | None]  # by level and by what shares a plan

    def __init__(self, config: ToMeConfig) -> None:
        self.config = config
        self.plans = {}

    def begin_step(self, step: Step, before: Step | None) -> None:
        """Drop plans that do not hold for a step any more."""
        every = self.config.plan_every
        holds = (
            every > 1
            and before is not None
            and not step.new_generation
            and step.index is not None
            and before.index is not None
            and step.index // every == before.index // every
            and (step.height, step.width, step.batch) == (before.height, before.width, before.batch)
        )
        if not holds:
            self.plans = {}

    def plan(self, hidden_states: Tensor, level: Level, layer: nn.Module, stage: str) -> MergePlan | None:
        """The plan for a layer's input.

        Args:
            hidden_states: (batch, tokens, channels).
            level: Its level, with something to remove.
            layer: The attention layer or transformer block.
            stage: The name of the UNet's block that it is in.

        Returns:
            ``None`` if an adaptive ratio finds too few tokens alike.
        """
        sharing = self.config.plan_per != "block" or self.config.plan_every > 1
        if not sharing and torch.compiler.is_compiling():
            return self._match(hidden_states, level, layer)  # a graph need not know where plans are kept
        sharers: dict[str, nn.Module | str | None] = {"block": layer, "stage": stage, "level": None}
        key = (level.downsample, sharers[self.config.plan_per])
        plan = self.plans.get(key)
        if plan is None or not plan.fits(hidden_states) or not self._still_right(plan, level):
            plan = self.plans[key] = self._match(hidden_states, level, layer)
        return plan

    def _still_right(self, plan: MergePlan, level: Level) -> bool:
        return isinstance(level.ratio, AdaptiveRatio) or plan.removed == level.removed

    def _match(self, hidden_states: Tensor, level: Level, layer: nn.Module) -> MergePlan | None:
        assert level.cells is not None
        similarity, best = match(self._metric(hidden_states, layer), level.cells)
        removed = level.removed
        if isinstance(level.ratio, AdaptiveRatio):
            alike = (similarity >= level.ratio.similarity).sum().item() / similarity.shape[0]  # waits for the device
            removed = min(removed, int(level.cells.tokens * level.ratio.choose(alike / level.cells.tokens)))
        return merge_most_similar(similarity, best, level.cells, removed) if removed else None

    def _metric(self, hidden_states: Tensor, attention: Any) -> Tensor:
        if self.config.metric != "keys":
            return hidden_states.detach()
        with torch.no_grad():
            keys = attention.to_k(hidden_states)  # (batch, tokens, heads · channels)
            return keys.unflatten(-1, (attention.heads, -1)).mean(dim=2)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}}
