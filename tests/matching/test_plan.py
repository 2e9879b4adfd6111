import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tomesd_plus.matching import MergePlan, make_cells, match, max_removed, merge_most_similar


@st.composite
def plans(draw):
    height, width = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    cell = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    if max_removed(height, width, cell) == 0:
        cell = (2, 2)
    removed = draw(st.integers(1, max_removed(height, width, cell)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    metric = torch.randn(draw(st.integers(1, 3)), height * width, 5, generator=generator)
    cells = make_cells(height, width, cell, draw(st.sampled_from([None, 1, 2, 3])), generator)
    return merge_most_similar(*match(metric, cells), cells, removed), metric, removed


@settings(deadline=None, max_examples=60)
@given(plans())
def test_a_plan_is_a_partition_and_its_unmerge_reaches_every_token(case):
    plan, metric, removed = case
    batch, tokens, _ = metric.shape
    assert plan.removed == removed and plan.tokens == tokens and plan.batch == batch
    merged = plan.merge(metric)
    assert merged.shape == (batch, tokens - removed, 5)
    assert plan.unmerge(merged).shape == metric.shape
    assert plan.sizes.sum(dim=1).eq(tokens).all() and plan.sizes.min() >= 1
    assert torch.equal(plan.inverse.gather(1, plan.kept), torch.arange(tokens - removed).expand(batch, -1))
    for sample in range(batch):
        assert torch.equal(plan.inverse[sample].bincount(minlength=tokens - removed), plan.sizes[sample])


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
    # a token that stands for itself alone comes back bit for bit
    alone = plan.sizes.gather(1, plan.inverse) == 1
    assert torch.equal(copied[alone], metric[alone])


def test_pruning_keeps_the_destination_as_it_is():
    plan = _plan()
    x = torch.randn(2, 16, 3)
    pruned = plan.merge(x, "prune")
    assert torch.equal(pruned, x.gather(1, plan.kept[..., None].expand(-1, -1, 3)))
    assert not torch.equal(pruned, plan.merge(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_the_mean_is_as_exact_as_the_dtype(dtype):
    x = torch.randn(2, 16, 3).to(dtype)
    merged = _plan().merge(x)
    assert _plan().unmerge(merged).dtype == dtype
    exact = _plan().merge(x.double())
    assert (merged - exact).abs().max() <= 4 * torch.finfo(dtype).eps


def test_gradients_pass_through_merge_and_unmerge():
    plan, x = _plan(), torch.randn(2, 16, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: plan.unmerge(plan.merge(x)), x)
    assert torch.autograd.gradcheck(lambda x: plan.unmerge(plan.merge(x, "prune")), x)


def test_tensors_that_do_not_lie_contiguously_are_merged_alike():
    x = torch.randn(2, 3, 16).transpose(1, 2)
    assert torch.equal(_plan().merge(x), _plan().merge(x.contiguous()))
    y = torch.randn(2, 3, 10).transpose(1, 2)
    assert torch.equal(_plan().unmerge(y), _plan().unmerge(y.contiguous()))


def test_a_plan_fits_only_its_own_batch_and_token_count():
    assert _plan().fits(torch.zeros(2, 16, 7))
    for shape in [(1, 16, 7), (2, 15, 7), (2, 16), (2, 7, 4, 4)]:
        assert not _plan().fits(torch.zeros(shape))


def _plan() -> MergePlan:
    metric = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
    cells = make_cells(4, 4)
    return merge_most_similar(*match(metric, cells), cells, 6)
