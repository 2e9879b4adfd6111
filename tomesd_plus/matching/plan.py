"""A merge plan: which tokens are averaged into which, as index tensors of fixed shape."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

MergeMode = Literal["merge", "prune"]

# Device types with a kernel for embedding_bag; MPS has one since torch 2.10. Others get plain operations.
WITH_KERNEL = {"cpu", "cuda", "meta"} | ({"mps"} if torch.__version__ >= "2.10" else set())


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Index tensors that shorten a sequence of N tokens to M and bring it back to N.

    A plan made for one tensor may be used on any other with the same batch and tokens. Merging is one kernel, and so
    is unmerging; the indices that they need are computed once, with the plan.

    Args:
        kept: For each of the M tokens of the merged sequence the token that it is, or that its group is merged into,
            (batch, M).
        inverse: For each of the N tokens its place in the merged sequence, (batch, N).
        sizes: How many tokens each token of the merged sequence stands for, (batch, M), at least 1.
        members: All tokens of the batch, those of one group side by side, as rows of (batch · N), in the order of the
            merged sequence, (batch · N,).
        starts: Where in ``members`` each group begins, (batch · M,).
        rows: ``inverse`` in rows of the merged sequences of the whole batch, one after the other, (batch · N,).

    Example:
        >>> plan = MergePlan.from_inverse(kept=torch.tensor([[0, 3]]), inverse=torch.tensor([[0, 0, 0, 1]]))
        >>> x = torch.tensor([[[1.0], [2.0], [6.0], [5.0]]])
        >>> plan.merge(x).flatten().tolist()
        [3.0, 5.0]
        >>> plan.unmerge(plan.merge(x)).flatten().tolist()
        [3.0, 3.0, 3.0, 5.0]
    """

    kept: Tensor
    inverse: Tensor
    sizes: Tensor
    members: Tensor
    starts: Tensor
    rows: Tensor

    @classmethod
    def from_inverse(cls, kept: Tensor, inverse: Tensor) -> "MergePlan":
        """Build a plan from its first two tensors, as in the class."""
        sizes = torch.zeros_like(kept).scatter_add_(1, inverse, torch.ones_like(inverse))
        rows = rows_of(inverse, kept.shape[1])
        starts = sizes.flatten().cumsum(0) - sizes.flatten()
        return cls(kept, inverse, sizes, rows.argsort(stable=True), starts, rows)

    @classmethod
    def from_pairs(cls, source: Tensor, destination: Tensor, tokens: int) -> "MergePlan":
        """Build the plan that merges each source into its destination and leaves all other tokens.

        Args:
            source: Tokens to merge away, none twice, (batch, removed).
            destination: Into which token each goes, one that stays itself, (batch, removed).
            tokens: N.

        Example:
            >>> plan = MergePlan.from_pairs(torch.tensor([[1, 3]]), torch.tensor([[0, 2]]), tokens=4)
            >>> plan.kept.tolist(), plan.inverse.tolist(), plan.sizes.tolist()
            ([[0, 2]], [[0, 0, 1, 1]], [[2, 2]])
        """
        batch, removed = source.shape
        every = torch.arange(tokens, device=source.device).expand(batch, -1)
        stays = torch.ones_like(every).scatter_(1, source, 0)
        inverse = stays.cumsum(1) - 1
        inverse.scatter_(1, source, inverse.gather(1, destination))
        last = tokens - removed  # a place for those that do not stay, cut off again
        kept = torch.empty(batch, last + 1, dtype=torch.int64, device=source.device)
        kept = kept.scatter_(1, torch.where(stays.bool(), inverse, last), every)[:, :last]
        return cls.from_inverse(kept, inverse)

    @property
    def tokens(self) -> int:
        """N, the tokens before merging."""
        return self.inverse.shape[1]

    @property
    def removed(self) -> int:
        """N - M, the tokens that merging removes."""
        return self.inverse.shape[1] - self.kept.shape[1]

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
            mode: ``"merge"``: each group becomes its mean. ``"prune"``: it becomes its destination, and the merged
                sources are dropped.
        """
        batch, tokens, channels = hidden_states.shape
        rows = hidden_states.reshape(batch * tokens, channels)
        merged = self._means(rows) if mode == "merge" else rows.index_select(0, rows_of(self.kept, tokens))
        return merged.view(batch, -1, channels)

    def _means(self, rows: Tensor) -> Tensor:
        """The mean of each group, (batch · M, channels), of all tokens of the batch, (batch · N, channels)."""
        if rows.device.type in WITH_KERNEL:
            return embedding_bag(self.members, rows, self.starts, mode="mean")
        exact = torch.promote_types(rows.dtype, torch.float32)  # as the kernel: a sum may overflow float16
        sums = torch.zeros(self.kept.numel(), rows.shape[1], dtype=exact, device=rows.device)
        return (sums.index_add(0, self.rows, rows.to(exact)) / self.sizes.view(-1, 1)).to(rows.dtype)

    def unmerge(self, hidden_states: Tensor) -> Tensor:
        """Lengthen (batch, M, channels) to (batch, N, channels): every token of a group gets the group's value."""
        batch, places, channels = hidden_states.shape
        return hidden_states.reshape(batch * places, channels).index_select(0, self.rows).view(batch, -1, channels)


def rows_of(index: Tensor, length: int) -> Tensor:
    """From (batch, …) indices into sequences to indices into the rows of all sequences, one after the other."""
    first = torch.arange(index.shape[0], device=index.device) * length
    return (index + first[:, None]).flatten()


def take(hidden_states: Tensor, index: Tensor) -> Tensor:
    """Pick tokens of each sequence: (batch, N, channels) by (batch, M) to (batch, M, channels)."""
    batch, tokens, channels = hidden_states.shape
    rows = hidden_states.reshape(batch * tokens, channels)
    return rows.index_select(0, rows_of(index, tokens)).view(batch, -1, channels)
