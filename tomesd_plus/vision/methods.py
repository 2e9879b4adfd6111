"""The methods that shorten a sequence: each makes a plan of what a layer's attention has seen.

A method that is learned (DynamicViT, A-ViT) finds its place here: its network is called with the same view and returns
the same plan.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tomesd_plus.matching import (
    SequencePlan,
    keep_attended,
    keep_sampled,
    merge_alternating,
    most_pairs,
    sample,
    significance,
    similarities,
)


@dataclass(frozen=True, eq=False)
class View:
    """What a method may look at, of one layer.

    Args:
        metric: Keys averaged over heads, (batch, tokens, channels).
        attention: The class token's attention, (batch, heads, tokens), float32; ``None`` if the method needs none.
        value_norms: Length of the values, (batch, heads, tokens), float32; ``None`` likewise.
        sizes: How many tokens each token stands for, (batch, tokens), float32.
        leading: How many tokens at the beginning must stay.
        removed: How many tokens to remove; ``None``: as the pictures allow, in merging by ``similarity``.
        similarity: From which on two tokens are alike, if it is given.
        step: What counts that depend on the pictures are multiples of.
    """

    metric: Tensor
    attention: Tensor | None
    value_norms: Tensor | None
    sizes: Tensor
    leading: int
    removed: int | None
    similarity: float | None
    step: int


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        plan: Makes the plan; ``None`` if nothing is to be removed.
        needs_class_token: Whether it looks at the class token's attention.
        most: From tokens and leading tokens to the most that it can remove in one layer.
    """

    plan: Callable[[View], SequencePlan | None]
    needs_class_token: bool
    most: Callable[[int, int], int]


def _merging(view: View) -> SequencePlan | None:
    metric = view.metric
    most = most_pairs(metric.shape[1], view.leading)
    if not most:
        return None
    similarity, best = similarities(metric, view.leading)
    removed = view.removed
    if removed is None:
        assert view.similarity is not None
        alike = (similarity >= view.similarity).sum().item() / len(metric)
        removed = min(int(alike), most) // view.step * view.step
        if not removed:
            return None
    return merge_alternating(similarity, best, view.sizes, view.leading, removed)


def _evit(view: View) -> SequencePlan | None:
    assert view.attention is not None and view.removed is not None
    return keep_attended(view.attention.mean(dim=1), view.leading, view.removed)


def _ats(view: View) -> SequencePlan | None:
    assert view.attention is not None and view.value_norms is not None
    score = significance(view.attention, view.value_norms, view.leading)
    candidates = score.shape[1]
    if view.removed is not None:  # tokens that are met twice leave room for others
        left = candidates - view.removed
        met, _ = sample(score, left)
    elif candidates:
        met, counts = sample(score, candidates)
        left = min(candidates, -(-int(counts.max()) // view.step) * view.step)
    if not candidates or left == candidates:
        return None
    return keep_sampled(met, score, view.metric, view.leading, left)


def _all_but_one(tokens: int, leading: int) -> int:
    return max(0, tokens - leading - 1)


METHODS = {
    "merging": Method(_merging, needs_class_token=False, most=most_pairs),
    "evit": Method(_evit, needs_class_token=True, most=_all_but_one),
    "ats": Method(_ats, needs_class_token=True, most=_all_but_one),
}
