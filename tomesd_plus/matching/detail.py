"""Detail-keeping unmerge: a token keeps its offset from its group's mean.

On a *full* step the layers that merge on others run on all tokens, and their output is ``kept``. On the steps between,

    output = unmerge(o) + (kept − unmerge(merge(kept)))

where o is the layer's output on merged tokens: each token gets its group's new value plus the offset that it had from
its group's mean when that was last known.
"""

from torch import Tensor

from tomesd_plus.matching.plan import MergeMode, MergePlan


def unmerge_with_detail(
    plan: MergePlan, output: Tensor, kept: Tensor | None = None, mode: MergeMode = "merge"
) -> Tensor:
    """Bring a layer's output on merged tokens back to all tokens, with the offsets of an earlier output.

    Merging is linear, so the formula above is ``kept + unmerge(o − merge(kept))``: one merge and one unmerge, and
    where nothing has changed since, the earlier output exactly, up to rounding.

    Args:
        plan: By which the layer's input was merged.
        output: (batch, M, channels).
        kept: The layer's output on all tokens, (batch, N, channels); ``None``, or one of another shape or device:
            plain unmerging.
        mode: As the input was merged.

    Returns:
        (batch, N, channels).

    Example:
        >>> import torch
        >>> plan = MergePlan.from_inverse(kept=torch.tensor([[0]]), inverse=torch.tensor([[0, 0]]))
        >>> kept = torch.tensor([[[1.0], [3.0]]])  # offsets from the mean: -1 and 1
        >>> unmerge_with_detail(plan, torch.tensor([[[5.0]]]), kept).flatten().tolist()
        [4.0, 6.0]
    """
    if kept is None or not plan.fits(kept):
        return plan.unmerge(output)
    return kept + plan.unmerge(output - plan.merge(kept, mode))
