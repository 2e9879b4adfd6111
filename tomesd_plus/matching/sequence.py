"""Merging in a sequence of tokens that stays short from layer to layer: weighted, and in a new order."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from tomesd_plus.matching.cells import Cells
from tomesd_plus.matching.plan import rows_of
from tomesd_plus.matching.similarity import match


@dataclass(frozen=True, eq=False)
class SequencePlan:
    """Shortens sequences of N tokens to M, by weighted means of groups, and brings them back to N.

    Unlike a :class:`~tomesd_plus.matching.MergePlan` it weighs the tokens of a group, which may stand for several
    already, and it may put the tokens into another order.

    Args:
        kept: For each of the M tokens the one of the N that stands for its group, (batch, M).
        inverse: For each of the N tokens its place among the M, (batch, N).
        members: The tokens that are averaged, those of one group side by side, as rows of (batch · N), (members,).
        starts: Where in ``members`` each group begins, (batch · M,).
        weights: The share of each member in its group, float32, (members,); ``None`` if each group has one member.
        kept_rows, inverse_rows: ``kept`` and ``inverse`` as rows of the whole batch.
    """

    kept: Tensor
    inverse: Tensor
    members: Tensor
    starts: Tensor
    weights: Tensor | None
    kept_rows: Tensor
    inverse_rows: Tensor

    @classmethod
    def weighted(cls, kept: Tensor, inverse: Tensor, mass: Tensor) -> "SequencePlan":
        """Average each group by the mass of its tokens.

        Args:
            kept, inverse: As in the class.
            mass: Of each of the N tokens, (batch, N), float32; a group without any is averaged evenly.

        Example:
            >>> kept, inverse = torch.tensor([[0, 2]]), torch.tensor([[0, 0, 1]])
            >>> plan = SequencePlan.weighted(kept, inverse, mass=torch.tensor([[3.0, 1.0, 1.0]]))
            >>> plan.merge(torch.tensor([[[1.0], [5.0], [7.0]]])).flatten().tolist()
            [2.0, 7.0]
        """
        places = kept.shape[1]
        mass = mass.clamp_min(torch.finfo(mass.dtype).tiny)
        of_group = mass.new_zeros(kept.shape).scatter_add_(1, inverse, mass)
        share = mass / of_group.gather(1, inverse)
        counts = torch.zeros_like(kept).scatter_add_(1, inverse, torch.ones_like(inverse)).flatten()
        rows = rows_of(inverse, places)
        members = rows.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        weights = share.flatten().index_select(0, members)
        return cls(kept, inverse, members, starts, weights, rows_of(kept, inverse.shape[1]), rows)

    @classmethod
    def picked(cls, kept: Tensor, inverse: Tensor) -> "SequencePlan":
        """Let the kept token stand for its group as it is, and drop the group's others."""
        rows = rows_of(kept, inverse.shape[1])
        starts = torch.arange(rows.shape[0], device=rows.device)
        return cls(kept, inverse, rows, starts, None, rows, rows_of(inverse, kept.shape[1]))

    def before(self, order: Tensor) -> "SequencePlan":
        """The same plan for tokens that were not yet put in order.

        Args:
            order: Which of them stands at each place of the tokens that this plan was made for, (batch, N).
        """
        rows = rows_of(order, order.shape[1])
        kept, inverse = order.gather(1, self.kept), torch.empty_like(order).scatter_(1, order, self.inverse)
        return SequencePlan(
            kept, inverse, rows[self.members], self.starts, self.weights, rows[self.kept_rows],
            rows_of(inverse, kept.shape[1]),
        )  # fmt: skip

    @property
    def removed(self) -> int:
        """N - M, the tokens that merging removes."""
        return self.inverse.shape[1] - self.kept.shape[1]

    def merge(self, hidden_states: Tensor) -> Tensor:
        """Shorten (batch, N, channels) to (batch, M, channels)."""
        batch, tokens, channels = hidden_states.shape
        rows = hidden_states.reshape(batch * tokens, channels)
        if self.weights is None:
            merged = rows.index_select(0, self.kept_rows)
        else:  # one kernel, whose sums have the same order each time, on GPUs too
            weights = self.weights.to(rows.dtype)
            merged = embedding_bag(self.members, rows, self.starts, mode="sum", per_sample_weights=weights)
        return merged.view(batch, -1, channels)

    def unmerge(self, hidden_states: Tensor) -> Tensor:
        """Lengthen (batch, M, channels) to (batch, N, channels): every token of a group gets the group's value."""
        batch, places, channels = hidden_states.shape
        rows = hidden_states.reshape(batch * places, channels)
        return rows.index_select(0, self.inverse_rows).view(batch, -1, channels)


def most_pairs(tokens: int, leading: int) -> int:
    """The most tokens that :func:`merge_alternating` can remove: half of those that are not leading.

    Example:
        >>> most_pairs(197, 1), most_pairs(5, 5), most_pairs(50, 2)
        (98, 0, 24)
    """
    return max(0, (tokens - leading) // 2)


def alternating(tokens: int, leading: int, device: torch.device | str = "cpu") -> Cells:
    """Every second token is a destination and the others are sources, but for the leading ones, which are neither.

    Example:
        >>> cells = alternating(7, leading=1)
        >>> cells.source.tolist(), cells.destination.tolist()
        ([[2, 4, 6]], [[1, 3, 5]])
    """
    places = torch.arange(tokens, device=device)
    even, odd = leading + leading % 2, leading + 1 - leading % 2  # the first such places that are not leading
    return Cells(tokens, destination=places[None, odd::2], source=places[None, even::2], padding=None)


def similarities(metric: Tensor, leading: int) -> tuple[Tensor, Tensor]:
    """The similarity of each source of :func:`alternating` to its best destination, and which that is.

    Args:
        metric: What similarity (cosine) is measured on, (batch, tokens, channels).
        leading: How many tokens at the beginning are left out.

    Returns:
        Both (batch, sources); the second counts destinations.
    """
    similarity, best = match(metric, alternating(metric.shape[1], leading, metric.device))
    return similarity[:, 0], best[:, 0]


def merge_alternating(similarity: Tensor, best: Tensor, sizes: Tensor, leading: int, removed: int) -> SequencePlan:
    """Merge the sources that are most similar to their destinations: bipartite soft matching.

    The method and the order of the tokens that it leaves behind are those of Bolya et al., "Token Merging: Your ViT
    But Faster" (https://arxiv.org/abs/2210.09461): leading tokens, the sources that stay, the destinations.

    Args:
        similarity, best: From :func:`similarities`.
        sizes: How many tokens each token stands for, (batch, tokens), float32.
        leading: How many tokens at the beginning are never merged.
        removed: How many tokens to remove from each sequence, at most :func:`most_pairs`.

    Example:
        >>> tokens = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
        >>> plan = merge_alternating(*similarities(tokens, 1), torch.ones(2, 9), leading=1, removed=3)
        >>> plan.merge(tokens).shape, plan.unmerge(plan.merge(tokens)).shape, bool((plan.kept[:, 0] == 0).all())
        (torch.Size([2, 6, 4]), torch.Size([2, 9, 4]), True)
    """
    batch, tokens = sizes.shape
    cells = alternating(tokens, leading, sizes.device)
    source, destination = cells.source[0], cells.destination[0]
    left = len(source) - removed
    chosen = similarity.topk(removed, dim=1, sorted=False).indices
    stays = torch.ones_like(best).scatter_(1, chosen, 0)
    rank = stays.cumsum(1) - 1
    beyond = torch.where(stays.bool(), rank, left)  # a place for those that do not stay, cut off again
    unmerged = best.new_empty(batch, left + 1).scatter_(1, beyond, source.expand(batch, -1))[:, :left]
    head = torch.arange(leading, device=sizes.device)
    kept = torch.cat([head.expand(batch, -1), unmerged, destination.expand(batch, -1)], dim=1)
    inverse = best.new_empty(batch, tokens)
    inverse[:, :leading] = head
    inverse[:, source] = leading + torch.where(stays.bool(), rank, left + best)
    inverse[:, destination] = leading + left + torch.arange(len(destination), device=sizes.device)
    return SequencePlan.weighted(kept, inverse, sizes)
