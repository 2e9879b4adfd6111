"""Weighted plans of sequences: merging, unmerging, orders."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tomesd_plus.matching import SequencePlan, keep_attended, merge_alternating, most_pairs, similarities
from tomesd_plus.matching.plan import take

seeds = st.integers(0, 2**30)


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(seeds, st.integers(1, 3), st.integers(2, 30), st.integers(0, 4), st.floats(0, 1))
def test_merging_averages_by_size_and_keeps_the_sum(seed, batch, tokens, leading, share):
    leading = min(leading, tokens)
    removed = int(share * most_pairs(tokens, leading))
    metric, x = random(seed, batch, tokens, 5), random(seed + 1, batch, tokens, 3)
    sizes = random(seed + 2, batch, tokens).abs() + 0.5
    plan = merge_alternating(*similarities(metric, leading), sizes, leading, removed) if removed else None
    if plan is None:
        return
    merged = plan.merge(x)
    assert merged.shape == (batch, tokens - removed, 3) and plan.removed == removed
    of_group = sizes.new_zeros(plan.kept.shape).scatter_add_(1, plan.inverse, sizes)
    torch.testing.assert_close((merged * of_group[..., None]).sum(1), (x * sizes[..., None]).sum(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.merge(plan.unmerge(merged)), merged, atol=1e-5, rtol=0)
    assert torch.equal(plan.kept[:, :leading], torch.arange(leading).expand(batch, -1))
    assert torch.equal(plan.inverse.gather(1, plan.kept), torch.arange(tokens - removed).expand(batch, -1))
    assert (plan.inverse[:, :leading].flatten() < leading).all()
    assert all((row.bincount()[:leading] == 1).all() for row in plan.inverse)  # nothing goes into a leading token


@given(seeds, st.integers(3, 20), st.integers(0, 3))
def test_a_plan_for_tokens_in_another_order_is_the_same_plan(seed, tokens, leading):
    generator = torch.Generator().manual_seed(seed)
    removed = most_pairs(tokens, leading)
    if not removed:
        return
    x = random(seed, 2, tokens, 4)
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(2)])
    ordered = take(x, order)
    plan = merge_alternating(*similarities(ordered, leading), torch.ones(2, tokens), leading, removed)
    again = plan.before(order)
    torch.testing.assert_close(again.merge(x), plan.merge(ordered))
    torch.testing.assert_close(take(again.unmerge(plan.merge(ordered)), order), plan.unmerge(plan.merge(ordered)))


def test_the_fused_token_is_weighted_by_attention():
    attention = torch.tensor([[0.4, 0.3, 0.1, 0.2, 0.0]])
    plan = keep_attended(attention, leading=1, removed=2)
    x = torch.arange(5.0).reshape(1, 5, 1)
    assert plan.kept.tolist() == [[0, 1, 3]]
    torch.testing.assert_close(plan.merge(x).flatten(), torch.tensor([0.0, 1.0, (2 * 0.1 + 3 * 0.2) / 0.3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_gradients(dtype):
    x = random(0, 2, 12, 4).to(dtype).requires_grad_()
    plan = merge_alternating(*similarities(x.detach(), 1), torch.ones(2, 12), 1, 4)
    merged = plan.merge(x)
    assert merged.dtype == dtype
    plan.unmerge(merged).sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(96.0, dtype=dtype), atol=0.5, rtol=0)


def test_a_group_without_mass_is_averaged_evenly():
    plan = SequencePlan.weighted(torch.tensor([[0]]), torch.tensor([[0, 0]]), torch.zeros(1, 2))
    assert plan.merge(torch.tensor([[[1.0], [3.0]]])).item() == 2
