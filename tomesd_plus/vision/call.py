"""A forward pass of a tower: what its tokens stand for before each layer. It travels through the layers' arguments."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tomesd_plus.host.transient import ThreadLocal
from tomesd_plus.matching import SequencePlan
from tomesd_plus.matching.plan import take
from tomesd_plus.vision.config import SIZES, TowerConfig
from tomesd_plus.vision.methods import METHODS, View

KEY = "token_merging"
"""The keyword under which layers and attention are given it: so a layer that is run again for gradients, in whichever
thread, after whichever other call, finds its own."""


@dataclass(frozen=True, eq=False)
class Sequence:
    """What the tokens between two layers stand for.

    Args:
        tokens: How many there are.
        sizes: How many of the original tokens each stands for, (batch, tokens), float32; ``None``: one each.
        kept: Which of the original tokens each is, (batch, tokens); ``None``: the same.
        inverse: The place of each original token, (batch, original tokens); ``None``: the same.
    """

    tokens: int
    sizes: Tensor | None = None
    kept: Tensor | None = None
    inverse: Tensor | None = None

    def after(self, plan: SequencePlan) -> "Sequence":
        """The same after merging by a plan for these tokens."""
        before = torch.ones_like(plan.inverse, dtype=torch.float32) if self.sizes is None else self.sizes
        sizes = before.new_zeros(plan.kept.shape).scatter_add_(1, plan.inverse, before)
        kept = plan.kept if self.kept is None else self.kept.gather(1, plan.kept)
        inverse = plan.inverse if self.inverse is None else plan.inverse.gather(1, self.inverse)
        return Sequence(plan.kept.shape[1], sizes, kept, inverse)

    def dense(self, hidden_states: Tensor) -> Tensor:
        """All original tokens in their places, (batch, original tokens, channels): each has its group's value."""
        return hidden_states if self.inverse is None else take(hidden_states, self.inverse)

    def again(self, hidden_states: Tensor) -> Tensor:
        """The inverse of :meth:`dense`."""
        return hidden_states if self.kept is None else take(hidden_states, self.kept)


@dataclass(eq=False)
class Call:
    """One forward pass.

    Args:
        config: What to merge.
        layers: How many there are.
        prefix: Tokens before the patches.
        grid: Rows and columns of patches, if they are known.
        sequences: Before the first layer, after the first, …, as far as the call has come.
        order: Protected patches first: which original token stands where before the first plan, (batch, tokens).
        leading: How many tokens at the beginning are never removed.
        reason: Why the whole call is left alone, if it is.
        batch: How many pictures.
    """

    config: TowerConfig
    layers: int
    prefix: int
    grid: tuple[int, int] | None = None
    sequences: list[Sequence] = field(default_factory=list)
    order: Tensor | None = None
    leading: int = 0
    reason: str | None = None
    batch: int = 0

    def begin(self, hidden_states: Tensor, has_mask: bool) -> None:
        """Meet the tokens before the first layer."""
        self.batch, tokens = hidden_states.shape[:2]
        if self.grid is not None and self.grid[0] * self.grid[1] != tokens - self.prefix:
            self.grid = None  # of other pictures, in a call that did not get here
        self.sequences = [Sequence(tokens)]
        self.leading = self.prefix
        if has_mask:
            self.reason = "the call has an attention mask"
        elif self.config.protect is not None:
            self.order = self._protected_first(self.batch, tokens).to(hidden_states.device)
            self.leading += self.config.protect.most

    def _protected_first(self, batch: int, tokens: int) -> Tensor:
        """An order in which protected patches, padded by others where a picture has fewer, follow the prefix."""
        mask, shape = self.config.protect.mask, self.config.protect.shape
        other_grid = self.grid is not None and len(shape) > 1 and shape[-2:] != self.grid
        if other_grid or mask.shape[1] != tokens - self.prefix or len(mask) not in (1, batch):
            known = "" if self.grid is None else f", {self.grid[0]} × {self.grid[1]},"
            raise ValueError(
                f"protect has shape {shape}, which does not fit "
                f"{tokens - self.prefix} patches{known} in each of {batch} pictures"
            )
        head = torch.arange(self.prefix).expand(batch, -1)
        patches = (~mask).to(torch.int8).argsort(dim=1, stable=True) + self.prefix
        return torch.cat([head, patches.expand(batch, -1)], dim=1)


@dataclass(eq=False)
class LayerCall:
    """One layer's part in a forward pass.

    Args:
        call: The forward pass.
        index: Of the layer.
        removed: How many tokens to remove; ``None``: as the pictures allow.
        keys: The layer's, (batch, tokens, heads · channels), until the plan is made.
        heads: How many.
        plan: What the layer does, once it is known; ``None``: nothing.
        planned: Whether it is known.
        attention, value_norms: See :class:`~tomesd_plus.vision.methods.View`.
    """

    call: Call
    index: int
    removed: int | None
    heads: int
    keys: Tensor | None = None
    attention: Tensor | None = None
    value_norms: Tensor | None = None
    plan: SequencePlan | None = None
    planned: bool = False

    @property
    def before(self) -> Sequence:
        """What the tokens before the layer stand for."""
        return self.call.sequences[self.index]

    @property
    def log_sizes(self) -> Tensor | None:
        """What is added to each key's logits, (batch, 1, 1, tokens), float32; ``None``: nothing."""
        sizes = self.before.sizes if self.call.config.weighs else None
        return None if sizes is None else sizes.log()[:, None, None]

    @property
    def looks_at_class_token(self) -> bool:
        """Whether the method needs the class token's attention and has it not."""
        return not self.planned and self.removed != 0 and METHODS[self.call.config.method].needs_class_token

    def make_plan(self) -> SequencePlan | None:
        """Decide what the layer does, once: a second run for gradients does the same."""
        if not self.planned:
            self.planned = True
            if self.removed != 0:
                with torch.no_grad():
                    self.plan = self._plan()
            self.keys = self.attention = self.value_norms = None
        return self.plan

    def _plan(self) -> SequencePlan | None:
        assert self.keys is not None
        config, before = self.call.config, self.before
        metric = self.keys.detach().unflatten(-1, (self.heads, -1)).mean(dim=2)
        sizes = metric.new_ones(metric.shape[:2], dtype=torch.float32) if before.sizes is None else before.sizes
        attention, value_norms = self.attention, self.value_norms
        order = self.call.order if before.kept is None else None
        if order is not None:
            metric = take(metric, order)
            attention, value_norms = (
                each if each is None else each.gather(2, order[:, None].expand(each.shape))
                for each in (attention, value_norms)
            )
        step = max(1, (self.call.sequences[0].tokens - self.call.prefix) // SIZES)
        leading = self.call.leading
        view = View(metric, attention, value_norms, sizes, leading, self.removed, config.similarity, step)
        plan = METHODS[config.method].plan(view)
        return plan if plan is None or order is None else plan.before(order)


class Current(ThreadLocal):
    """What a thread has under way in a tower."""

    def __init__(self) -> None:
        self.layer: LayerCall | None = None
        self.grid: tuple[int, int] | None = None
