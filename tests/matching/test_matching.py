from contextlib import contextmanager
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tomesd_plus.matching import make_cells, match, max_removed, merge_most_similar
from tomesd_plus.matching import similarity as matching

sides, cell_sides, windows = st.integers(1, 12), st.integers(1, 4), st.sampled_from([None, 1, 2, 3, 5])


@settings(deadline=None)
@given(sides, sides, cell_sides, cell_sides, windows, st.integers(0, 99))
def test_every_whole_cell_has_one_destination_and_the_rest_of_it_as_sources(
    height, width, cell_height, cell_width, window, seed
):
    rows, columns = height // cell_height, width // cell_width
    if not rows or not columns:
        assert max_removed(height, width, (cell_height, cell_width)) == 0
        return
    generator = torch.Generator().manual_seed(seed)
    cells = make_cells(height, width, (cell_height, cell_width), window, generator)
    real = torch.ones_like(cells.source, dtype=torch.bool) if cells.padding is None else ~cells.padding
    sources = cells.source[real]
    destinations = cells.destination.unique()  # at the edge, windows are filled up with destinations again
    assert len(sources) == max_removed(height, width, (cell_height, cell_width))
    assert len(destinations) == rows * columns and cells.tokens == height * width
    every = torch.cat([sources, destinations]).sort().values
    inside = torch.arange(height * width).view(height, width)[: rows * cell_height, : columns * cell_width]
    assert torch.equal(every, inside.flatten().sort().values)  # each token of a whole cell once, no other
    grid = torch.zeros(height * width, dtype=torch.int64)
    grid[destinations] = 1
    grid = grid.view(height, width)[: rows * cell_height, : columns * cell_width]
    assert grid.reshape(rows, cell_height, columns, cell_width).sum(dim=(1, 3)).eq(1).all()


def test_fixed_destinations_are_the_first_of_their_cells():
    assert make_cells(4, 6).destination.tolist() == [[0, 2, 4, 12, 14, 16]]


def test_random_destinations_come_from_the_generator():
    first, again, other = (make_cells(8, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first.destination, again.destination)
    assert not torch.equal(first.destination, other.destination)


def _pairs(plan):
    """Which token is merged into which, in the first sample."""
    into = plan.kept[0][plan.inverse[0]]
    return {token: int(into[token]) for token in range(plan.tokens) if int(into[token]) != token}


def test_the_most_similar_sources_are_merged_into_their_most_similar_destination():
    # a row of two cells; the destinations are tokens 0 and 4; 1 is like 0, 5 is like 4, the others like neither
    metric = torch.zeros(1, 8, 4)
    metric[0, [0, 1], 0] = 1.0
    metric[0, [4, 5], 1] = 1.0
    metric[0, [2, 3, 6, 7], 2] = 1.0
    metric[0, 6, 1] = 0.5  # a little like 4
    cells = make_cells(1, 8, (1, 4))
    assert _pairs(merge_most_similar(*match(metric, cells), cells, 3)) == {1: 0, 5: 4, 6: 4}
    metric[0, 1] = metric[0, 4]  # like the other cell's destination: out of reach in a window of one cell
    assert _pairs(merge_most_similar(*match(metric, cells), cells, 2)) == {1: 4, 5: 4}
    near = make_cells(1, 8, (1, 4), window=1)
    assert _pairs(merge_most_similar(*match(metric, near), near, 2)) == {5: 4, 6: 4}


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 13), st.integers(2, 13), st.integers(1, 3), st.integers(0, 99))
def test_similarities_are_those_of_all_pairs_inside_a_window(height, width, window, seed):
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, height * width, 6, generator=generator)
    cells = make_cells(height, width, (2, 2), window, generator)
    similarity, best = match(metric, cells)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    for w in range(len(cells.source)):
        scores = unit[:, cells.source[w]] @ unit[:, cells.destination[w]].transpose(1, 2)
        real = slice(None) if cells.padding is None else ~cells.padding[w]
        torch.testing.assert_close(similarity[:, w][:, real], scores.max(dim=-1).values[:, real])
        chosen = scores.gather(2, best[:, w, :, None])[..., 0]
        torch.testing.assert_close(chosen[:, real], scores.max(dim=-1).values[:, real])


def test_windows_that_cover_everything_match_as_one():
    metric = torch.randn(2, 12 * 20, 8, generator=torch.Generator().manual_seed(0))
    plans = []
    for window in (None, 10):
        cells = make_cells(12, 20, (2, 2), window, torch.Generator().manual_seed(1))
        plans.append(merge_most_similar(*match(metric, cells), cells, 100))
    assert torch.equal(plans[0].inverse, plans[1].inverse)


def test_chunks_give_what_the_whole_gives(monkeypatch):
    metric = torch.randn(2, 256, 8, generator=torch.Generator().manual_seed(0))
    cells = make_cells(16, 16)
    whole = match(metric, cells)
    monkeypatch.setattr(matching, "MAX_SCORES", 1000)
    for one, other in zip(whole, match(metric, cells)):
        torch.testing.assert_close(one, other)


@contextmanager
def peak_allocated():
    """Yields a list that will hold the most bytes that tensors made inside a ``with`` block took at one time."""
    peak = []
    with torch.profiler.profile(profile_memory=True) as profile:
        yield peak
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak.append(max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))))


@pytest.mark.parametrize(("channels", "most"), [(4, 50e6), (320, 150e6)])
def test_many_tokens_need_no_score_matrix_in_memory(channels, most):
    """65,536 tokens, 84 MB with 320 channels: all scores would be 3.2 GB, those of windows 12 MB."""
    metric = torch.randn(1, 65536, channels, generator=torch.Generator().manual_seed(0))
    with peak_allocated() as peak:
        cells = make_cells(256, 256, window=8)
        similarity, best = match(metric, cells)
        plan = merge_most_similar(similarity, best, cells, 40_000)
    assert plan.removed == 40_000
    assert metric.nbytes < peak[0] < most
    with peak_allocated() as peak:
        match(metric[:, :16384], make_cells(128, 128))  # all 12,288 × 4,096 scores would be 200 MB
    assert metric.nbytes / 4 < peak[0] < 50e6


def test_all_sources_can_be_removed():
    cells = make_cells(5, 5)
    plan = merge_most_similar(*match(torch.randn(1, 25, 4), cells), cells, 12)
    assert plan.removed == 12
    assert all(place in plan.kept[0] for place in (4, 9, 20, 24))  # what fills no cell stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1])
def test_tokens_of_zeros_give_a_valid_plan(dtype, window):
    metric = torch.zeros(2, 16, 4, dtype=dtype)
    metric[:, 3] = 1
    cells = make_cells(4, 4, window=window)
    similarity, best = match(metric, cells)
    assert similarity.isfinite().all()
    assert merge_most_similar(similarity, best, cells, 5).sizes.sum(dim=1).tolist() == [16, 16]
