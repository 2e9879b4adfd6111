import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tomesd_plus.matching import bipartite_match, destination_mask, max_removed


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_every_whole_cell_has_one_destination(height, width, cell_height, cell_width, seed):
    mask = destination_mask(height, width, (cell_height, cell_width), torch.Generator().manual_seed(seed))
    rows, columns = height // cell_height, width // cell_width
    cells = mask[: rows * cell_height, : columns * cell_width]
    cells = cells.reshape(rows, cell_height, columns, cell_width).sum(dim=(1, 3))
    assert mask.shape == (height, width)
    assert cells.eq(1).all()
    assert mask.sum() == rows * columns  # and what fills no cell has none
    if rows * columns:
        assert max_removed(height, width, (cell_height, cell_width)) == height * width - rows * columns
    else:
        assert max_removed(height, width, (cell_height, cell_width)) == 0


def test_fixed_destinations_are_the_first_of_their_cells():
    assert destination_mask(4, 6).nonzero().tolist() == [[y, x] for y in (0, 2) for x in (0, 2, 4)]


def test_random_destinations_come_from_the_generator():
    first = destination_mask(8, 8, generator=torch.Generator().manual_seed(3))
    again = destination_mask(8, 8, generator=torch.Generator().manual_seed(3))
    other = destination_mask(8, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_most_similar_sources_are_merged_into_their_most_similar_destination():
    # a row of two cells; the destinations are tokens 0 and 4; 1 is like 0, 5 is like 4, the others like neither
    metric = torch.zeros(1, 8, 4)
    metric[0, [0, 1], 0] = 1.0
    metric[0, [4, 5], 1] = 1.0
    metric[0, [2, 3, 6, 7], 2] = 1.0
    metric[0, 6, 1] = 0.5  # a little like 4
    mask = torch.tensor([[True, False, False, False, True, False, False, False]])
    plan = bipartite_match(metric, mask, 2, 3)
    into = {m: int(plan.destination[0, t]) for m, t in zip(plan.merged[0].tolist(), plan.target[0].tolist())}
    assert into == {1: 0, 5: 4, 6: 4}


def test_never_more_than_there_are_sources():
    plan = bipartite_match(torch.randn(1, 16, 4), destination_mask(4, 4), 4, 15)
    assert plan.removed == 12 and plan.unmerged.shape[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_of_zeros_give_a_valid_plan(dtype):
    metric = torch.zeros(2, 16, 4, dtype=dtype)
    metric[:, 3] = 1
    plan = bipartite_match(metric, destination_mask(4, 4), 4, 5)
    assert plan.sizes().sum(dim=1).tolist() == [16, 16]
