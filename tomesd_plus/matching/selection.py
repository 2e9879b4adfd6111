"""Tokens chosen by what the class token attends to, instead of by their likeness."""

import torch
from torch import Tensor

from tomesd_plus.matching.sequence import SequencePlan


@torch.no_grad()
def keep_attended(attention: Tensor, leading: int, removed: int) -> SequencePlan:
    """Keep the tokens that the class token attends to most, and fuse the others into one.

    The method is that of Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations" (EViT, https://arxiv.org/abs/2202.07800). The fused token is the mean of those that go, weighted
    by the attention; it stands last.

    Args:
        attention: The class token's to each token, averaged over heads, (batch, tokens), float32.
        leading: How many tokens at the beginning are kept in any case.
        removed: How many tokens fewer there are to be, at most the others but one; one more than that are fused.

    Example:
        >>> plan = keep_attended(torch.tensor([[0.5, 0.2, 0.1, 0.05, 0.15]]), leading=1, removed=1)
        >>> plan.kept.tolist(), plan.inverse.tolist()
        ([[0, 1, 4, 2]], [[0, 1, 3, 3, 2]])
    """
    batch, tokens = attention.shape
    order = attention[:, leading:].argsort(dim=1, descending=True, stable=True) + leading
    stays = order[:, : tokens - leading - removed - 1].sort(dim=1).values
    goes = order[:, tokens - leading - removed - 1 :]
    head = torch.arange(leading, device=attention.device).expand(batch, -1)
    kept = torch.cat([head, stays, goes[:, :1]], dim=1)
    fused = torch.full_like(goes, kept.shape[1] - 1)
    return SequencePlan.weighted(kept, _inverse(kept, goes, fused, tokens), attention)


@torch.no_grad()
def significance(attention: Tensor, value_norms: Tensor, leading: int) -> Tensor:
    """How much each token adds to the class token's output, as a share of all that are not leading: ATS's score.

    Args:
        attention: The class token's, (batch, heads, tokens), float32.
        value_norms: Length of each token's value, (batch, heads, tokens).
        leading: How many tokens at the beginning are left out.

    Returns:
        (batch, tokens - leading), sums to 1.
    """
    score = (attention * value_norms).sum(dim=1)[:, leading:]
    return score / score.sum(dim=1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)


@torch.no_grad()
def sample(score: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Sample tokens by inverse transform sampling at evenly spaced points of the scores' cumulative sum.

    The method is that of Fayyaz et al., "Adaptive Token Sampling For Efficient Vision Transformers" (ATS,
    https://arxiv.org/abs/2111.15667). A token that is met at several points is kept once, so pictures whose scores
    lie on few tokens keep few.

    Args:
        score: From :func:`significance`, (batch, candidates).
        points: How many to sample at, at least 1.

    Returns:
        Which candidates are met, (batch, candidates), bool; and how many of each sequence, (batch,).

    Example:
        >>> met, counts = sample(torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]), points=3)
        >>> met.int().tolist(), counts.tolist()
        ([[1, 0, 1, 0], [1, 1, 0, 1]], [2, 3])
    """
    places = (torch.arange(points, device=score.device, dtype=score.dtype) * 2 + 1) / (2 * points)
    total = score.cumsum(dim=1)
    met = torch.searchsorted(total, places.expand(len(score), -1).contiguous()).clamp_max(score.shape[1] - 1)
    taken = torch.zeros_like(score, dtype=torch.int64).scatter_(1, met, 1)
    return taken.bool(), taken.sum(dim=1)


@torch.no_grad()
def keep_sampled(met: Tensor, score: Tensor, metric: Tensor, leading: int, left: int) -> SequencePlan:
    """Keep the sampled tokens, and of the others those with the highest score until there are as many as wanted.

    Args:
        met: From :func:`sample`, (batch, candidates).
        score: From :func:`significance`, (batch, candidates).
        metric: By whose cosine similarity each token that goes finds the one that stands for it, so that dense
            output has a value for it, (batch, tokens, channels).
        leading: How many tokens at the beginning are kept in any case.
        left: How many of the candidates to keep in each sequence, at least as many as are met.
    """
    batch, tokens = len(score), leading + score.shape[1]
    order = (score + 2 * met).argsort(dim=1, descending=True, stable=True) + leading
    stays, goes = order[:, :left].sort(dim=1).values, order[:, left:]
    head = torch.arange(leading, device=score.device).expand(batch, -1)
    kept = torch.cat([head, stays], dim=1)
    metric = metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(metric.dtype).tiny)
    of_those = [metric.gather(1, each[..., None].expand(-1, -1, metric.shape[2])) for each in (goes, stays)]
    best = (of_those[0] @ of_those[1].transpose(1, 2)).argmax(dim=-1) + leading
    return SequencePlan.picked(kept, _inverse(kept, goes, best, tokens))


def _inverse(kept: Tensor, goes: Tensor, place: Tensor, tokens: int) -> Tensor:
    """For each token its place: those kept in their order, those that go where they are told."""
    batch = len(kept)
    inverse = kept.new_empty(batch, tokens)
    inverse.scatter_(1, goes, place)
    return inverse.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand(batch, -1))
