"""Which tokens merge into which: bipartite soft matching on a grid of cells.

The method is that of Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (https://arxiv.org/abs/2303.17604):
one destination in every cell, every other token of it a source; each source looks for its most similar destination,
and the sources that are most similar to theirs are merged. Here a source may look only inside its window, and no
score matrix of all sources and destinations is ever in memory.
"""

import torch
from torch import Tensor

from tomesd_plus.matching.cells import Cells
from tomesd_plus.matching.plan import MergePlan

MAX_SCORES = 1 << 23  # in memory at a time: 32 MB in float32, beside the tokens compared


@torch.no_grad()
def match(metric: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
    """Find the most similar destination of each source.

    Args:
        metric: What similarity (cosine) is measured on, (batch, tokens, channels).
        cells: Sources and destinations.

    Returns:
        Similarity in [-1, 1], or −inf where a source is padding; and the destination's place in its window. Both
        (batch, windows, sources).

    Example:
        >>> from tomesd_plus.matching import make_cells
        >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [3.0, 0.0]]])  # (1, 4, 2)
        >>> similarity, best = match(tokens, make_cells(2, 2))  # token 0 is the destination of the others
        >>> similarity.tolist(), best.tolist()
        ([[[0.0, 0.0, 1.0]]], [[[0, 0, 0]]])
    """
    batch, _, channels = metric.shape
    windows, destinations = cells.destination.shape
    target = metric.index_select(1, cells.destination.flatten())
    target = target / _length(target)
    target = target.view(batch, windows, destinations, channels).transpose(-1, -2)
    parts = []
    for chunk in cells.source.split(max(1, MAX_SCORES // (batch * windows * destinations)), dim=1):
        source = metric.index_select(1, chunk.flatten())
        score, best = (source.view(batch, windows, -1, channels) @ target).max(dim=-1)
        parts.append((score / _length(source).view(score.shape), best))
    similarity, best = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    similarity = similarity.nan_to_num(-1.0, 1.0, -1.0)  # of NaN, or beyond the dtype's range: the last to be merged
    if cells.padding is not None:
        similarity = similarity.masked_fill(cells.padding, -torch.inf)
    return similarity, best


def merge_most_similar(similarity: Tensor, best: Tensor, cells: Cells, removed: int) -> MergePlan:
    """Plan to merge the sources that are most similar to their destinations.

    Args:
        similarity, best: As :func:`match` returns them.
        cells: The same as there.
        removed: How many tokens to remove, at most as many as there are sources; from each sample of the batch.

    Example:
        >>> from tomesd_plus.matching import make_cells
        >>> tokens = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
        >>> cells = make_cells(8, 8)
        >>> plan = merge_most_similar(*match(tokens, cells), cells, removed=32)
        >>> plan.merge(tokens).shape, plan.unmerge(plan.merge(tokens)).shape
        (torch.Size([2, 32, 16]), torch.Size([2, 64, 16]))
    """
    destinations, sources = cells.destination.shape[1], cells.source.shape[1]
    chosen = similarity.flatten(1).topk(removed, sorted=False).indices
    place = chosen // sources * destinations + best.flatten(1).gather(1, chosen)
    return MergePlan.from_pairs(cells.source.flatten()[chosen], cells.destination.flatten()[place], cells.tokens)


def _length(vectors: Tensor) -> Tensor:
    length = vectors.norm(dim=-1, keepdim=True)
    return length.clamp_min(torch.finfo(length.dtype).tiny)  # a token of zeros is similar to nothing
