"""A merge plan: which tokens are averaged into which, as index tensors of fixed shape."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MergeMode = Literal["merge", "prune"]


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Index tensors that shorten a sequence of N tokens to M and bring it back to N.

    The M tokens of a merged sequence are the sources that stay, then the destinations, in the order of the indices
    below. A plan made for one tensor may be used on any other with the same batch and tokens.

    Args:
        unmerged: Token indices of the sources that stay, (batch, M - destinations).
        destination: Token indices of the destinations, (batch, destinations).
        merged: Token indices of the sources that are merged away, (batch, N - M).
        target: For each merged source its destination, as an index into ``destination``, (batch, N - M).
        inverse: For each of the N tokens its place in the merged sequence, (batch, N).

    Example:
        >>> plan = MergePlan.from_indices(
        ...     unmerged=torch.tensor([[3]]), destination=torch.tensor([[0]]),
        ...     merged=torch.tensor([[1, 2]]), target=torch.tensor([[0, 0]]))
        >>> x = torch.tensor([[[1.0], [2.0], [6.0], [5.0]]])
        >>> plan.merge(x).flatten().tolist()
        [5.0, 3.0]
        >>> plan.unmerge(plan.merge(x)).flatten().tolist()
        [3.0, 3.0, 3.0, 5.0]
    """

    unmerged: Tensor
    destination: Tensor
    merged: Tensor
    target: Tensor
    inverse: Tensor

    @classmethod
    def from_indices(cls, unmerged: Tensor, destination: Tensor, merged: Tensor, target: Tensor) -> "MergePlan":
        """Build a plan, with the inverse that its unmerge needs. All four are (batch, …), as in the class."""
        kept = torch.cat([unmerged, destination], dim=1)
        inverse = kept.new_empty(kept.shape[0], kept.shape[1] + merged.shape[1])
        inverse.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
        inverse.scatter_(1, merged, target + unmerged.shape[1])
        return cls(unmerged, destination, merged, target, inverse)

    @property
    def tokens(self) -> int:
        """N, the tokens before merging."""
        return self.inverse.shape[1]

    @property
    def removed(self) -> int:
        """N - M, the tokens that merging removes."""
        return self.merged.shape[1]

    @property
    def batch(self) -> int:
        """The batch size that the plan is for."""
        return self.inverse.shape[0]

    def fits(self, hidden_states: Tensor) -> bool:
        """True if the tensor is (batch, N, channels) on the plan's device."""
        return (
            hidden_states.ndim == 3
            and hidden_states.shape[:2] == self.inverse.shape
            and hidden_states.device == self.inverse.device
        )

    def merge(self, hidden_states: Tensor, mode: MergeMode = "merge") -> Tensor:
        """Shorten (batch, N, channels) to (batch, M, channels).

        Args:
            hidden_states: The tokens; any floating dtype.
            mode: ``"merge"``: a destination becomes the mean of itself and the sources merged into it. ``"prune"``:
                it stays as it is, and the merged sources are dropped.
        """
        unmerged = _take(hidden_states, self.unmerged)
        destination = _take(hidden_states, self.destination)
        if mode == "merge":
            source = _take(hidden_states, self.merged)
            index = self.target[..., None].expand_as(source)
            destination = destination.scatter_reduce(1, index, source, reduce="mean")
        return torch.cat([unmerged, destination], dim=1)

    def unmerge(self, hidden_states: Tensor) -> Tensor:
        """Lengthen (batch, M, channels) to (batch, N, channels): a merged source gets its destination's value."""
        return _take(hidden_states, self.inverse)

    def sizes(self) -> Tensor:
        """How many tokens each token of the merged sequence stands for: (batch, M), int64, at least 1."""
        kept = self.tokens - self.removed
        sizes = torch.zeros(self.batch, kept, dtype=torch.int64, device=self.inverse.device)
        return sizes.scatter_add_(1, self.inverse, torch.ones_like(self.inverse))


def _take(hidden_states: Tensor, index: Tensor) -> Tensor:
    return hidden_states.gather(1, index[..., None].expand(-1, -1, hidden_states.shape[2]))
