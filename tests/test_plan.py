import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tomesd_plus.matching import bipartite_match, destination_mask, max_removed
from tomesd_plus.plan import MergePlan


@st.composite
def plans(draw):
    height, width = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    cell = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    sources = max_removed(height, width, cell)
    if sources == 0:
        cell = (2, 2)
        sources = max_removed(height, width, cell)
    removed = draw(st.integers(1, sources))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    metric = torch.randn(draw(st.integers(1, 3)), height * width, 5, generator=generator)
    mask = destination_mask(height, width, cell, generator)
    return bipartite_match(metric, mask, height * width - sources, removed), metric, removed


@settings(deadline=None, max_examples=60)
@given(plans())
def test_a_plan_is_a_partition_and_its_unmerge_reaches_every_token(case):
    plan, metric, removed = case
    batch, tokens, _ = metric.shape
    every = torch.cat([plan.unmerged, plan.destination, plan.merged], dim=1).sort(dim=1).values
    assert torch.equal(every, torch.arange(tokens).expand(batch, -1))
    assert plan.removed == removed and plan.tokens == tokens and plan.batch == batch
    merged = plan.merge(metric)
    assert merged.shape == (batch, tokens - removed, 5)
    assert plan.unmerge(merged).shape == metric.shape
    assert plan.sizes().sum(dim=1).eq(tokens).all() and plan.sizes().min() >= 1


@settings(deadline=None, max_examples=40)
@given(plans())
def test_merging_averages_each_group_and_unmerging_copies_the_average(case):
    plan, metric, _ = case
    merged = plan.merge(metric)
    for sample in range(plan.batch):
        for place in range(merged.shape[1]):
            group = metric[sample][plan.inverse[sample] == place]
            torch.testing.assert_close(merged[sample, place], group.mean(dim=0))
    copied = plan.unmerge(merged)
    torch.testing.assert_close(plan.unmerge(plan.merge(copied)), copied)  # a second time changes nothing
    # a token that was not merged comes back bit for bit
    untouched = plan.unmerged[..., None].expand(-1, -1, 5)
    assert torch.equal(copied.gather(1, untouched), metric.gather(1, untouched))


def test_pruning_keeps_the_destination_as_it_is():
    plan = _plan()
    x = torch.randn(2, 16, 3)
    pruned = plan.merge(x, "prune")
    kept = torch.cat([plan.unmerged, plan.destination], dim=1)
    assert torch.equal(pruned, x.gather(1, kept[..., None].expand(-1, -1, 3)))
    assert not torch.equal(pruned, plan.merge(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    x = torch.randn(2, 16, 3).to(dtype)
    assert _plan().unmerge(_plan().merge(x)).dtype == dtype


def test_gradients_pass_through_merge_and_unmerge():
    plan, x = _plan(), torch.randn(2, 16, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: plan.unmerge(plan.merge(x)), x)


def test_a_plan_fits_only_its_own_batch_and_token_count():
    assert _plan().fits(torch.zeros(2, 16, 7))
    for shape in [(1, 16, 7), (2, 15, 7), (2, 16), (2, 7, 4, 4)]:
        assert not _plan().fits(torch.zeros(shape))


def _plan() -> MergePlan:
    generator = torch.Generator().manual_seed(0)
    return bipartite_match(torch.randn(2, 16, 3, generator=generator), destination_mask(4, 4), 4, 6)
