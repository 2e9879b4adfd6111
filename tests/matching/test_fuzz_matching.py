"""Whatever the sizes, cells and values: a valid plan, or a clear error. `make test-slow` tries many thousands."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tomesd_plus import ToMeConfig
from tomesd_plus.matching import make_cells, match, max_removed, merge_most_similar
from tomesd_plus.merging.planner import levels_of

VALUES = ("normal", "zeros", "one zero", "equal", "NaN", "one NaN", "Inf", "-Inf", "huge", "tiny")
EVERY = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

sizes = st.tuples(st.integers(1, 200), st.integers(1, 40)) | st.tuples(st.integers(1, 9), st.integers(1, 9))
cell_sizes = st.tuples(st.integers(1, 5), st.integers(1, 5)) | st.sampled_from([(2, 2), (1, 300), (300, 1)])
ratios = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-0.5, 1.5)


def vectors(kind, shape, dtype, seed=0):
    """Tensors that give trouble."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    place = seed % made.numel()
    if kind in ("zeros", "equal"):
        made = torch.full(shape, float(kind == "equal"))
    elif kind == "one zero":
        made[:, seed % shape[1]] = 0
    elif kind == "one NaN":
        made.view(-1)[place] = math.nan
    elif kind in ("NaN", "Inf", "-Inf"):
        made.view(-1)[::3] = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf}[kind]
    elif kind in ("huge", "tiny"):
        scale = torch.finfo(dtype).max / 8 if kind == "huge" else torch.finfo(dtype).tiny
        made = made.clamp(-4, 4).double() * scale
    return made.to(dtype)


cases = st.tuples(
    sizes, cell_sizes, st.sampled_from([None, 1, 2, 8]), st.floats(0, 1), st.sampled_from(VALUES),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 10_000),
)  # fmt: skip


def check_plan(case):
    (height, width), cell, window, share, kind, dtype, seed = case
    most = max_removed(height, width, cell)
    removed = min(max(1, int(share * most)), most)
    if not removed:
        return
    metric = vectors(kind, (1 + seed % 2, height * width, 3), dtype, seed)
    generator = torch.Generator().manual_seed(seed) if seed % 3 else None
    cells = make_cells(height, width, cell, window, generator)
    similarity, best = match(metric, cells)
    assert not similarity.isnan().any() and (kind == "tiny" or similarity.max() <= 1.05)
    plan = merge_most_similar(similarity, best, cells, removed)
    batch, tokens, _ = metric.shape
    assert plan.removed == removed and plan.kept.shape == (batch, tokens - removed)
    assert torch.equal(plan.sizes.sum(1), torch.full((batch,), tokens)) and plan.sizes.min() >= 1
    assert torch.equal(plan.inverse.gather(1, plan.kept), torch.arange(tokens - removed).expand(batch, -1))
    values = vectors("normal", metric.shape, torch.float32, seed)
    merged = plan.merge(values)
    assert merged.isfinite().all() and plan.unmerge(merged).shape == values.shape
    torch.testing.assert_close((merged * plan.sizes[..., None]).sum(1), values.sum(1), rtol=1e-3, atol=1e-2)
    alone = plan.sizes.gather(1, plan.inverse) == 1
    assert torch.equal(plan.unmerge(merged)[alone], values[alone])
    sources = cells.source.flatten() if cells.padding is None else cells.source[~cells.padding]
    merged_away = torch.ones(batch, tokens, dtype=torch.bool).scatter_(1, plan.kept, False)
    assert torch.isin(merged_away.nonzero()[:, 1], sources).all()  # never padding


@settings(deadline=None, max_examples=150, suppress_health_check=EVERY)
@given(cases)
@example(((1, 1), (1, 1), None, 1.0, "normal", torch.float32, 0))
@example(((2, 2), (300, 1), 8, 1.0, "NaN", torch.float16, 0))
def test_plans_are_valid(case):
    check_plan(case)


def step_of(height, width, noise_level):
    return SimpleNamespace(height=height, width=width, noise_level=noise_level)


configurations = st.fixed_dictionaries(
    {},
    optional={
        "cell_size": cell_sizes, "window": st.sampled_from([None, 1, 3, 8]),
        "max_downsample": st.sampled_from([1, 2, 4, 8]),
        "destinations": st.sampled_from(["random", "fixed"]), "seed": st.integers(0, 2**64),
    },
)  # fmt: skip


def check_levels(ratio, options, size, noise_level):
    """A ratio in [0, 1) that the cells allow is taken; of any other the error names the ratio."""
    cell = options.get("cell_size", (2, 2))
    allowed = 0 <= ratio < 1 and ratio <= 1 - 1 / math.prod(cell) + 1e-9
    if not allowed:
        with pytest.raises(ValueError, match="ratio"):
            ToMeConfig(ratio=ratio, **options)
        return
    config = ToMeConfig(ratio=ratio, **options)
    generator = torch.Generator().manual_seed(0) if config.destinations == "random" else None
    levels = levels_of(step_of(*size, noise_level), config, config.schedules, generator, torch.device("cpu"))
    for tokens, level in levels.items():
        assert tokens == level.height * level.width and 0 <= level.removed <= ratio * tokens + 1e-6
        assert (level.cells is not None) == bool(level.removed) and (level.reason is None) == bool(level.removed)
        if level.cells is not None:
            assert level.cells.tokens == tokens and level.cells.source.max() < tokens


@settings(deadline=None, max_examples=150, suppress_health_check=EVERY)
@given(ratios, configurations, sizes, st.floats(0, 1))
@example(math.nan, {}, (1, 1), 0.0)
@example(1.0, {"cell_size": (300, 1)}, (200, 40), 1.0)
def test_levels_are_valid_or_refused(ratio, options, size, noise_level):
    check_levels(ratio, options, size, noise_level)


@pytest.mark.slow
def test_many_plans_and_levels(capsys):
    tried = {"plans": 0, "levels": 0}

    @settings(deadline=None, max_examples=10_000, suppress_health_check=EVERY, database=None)
    @given(cases)
    def plans(case):
        tried["plans"] += 1
        check_plan(case)

    @settings(deadline=None, max_examples=3_000, suppress_health_check=EVERY, database=None)
    @given(ratios, configurations, sizes, st.floats(0, 1))
    def levels(ratio, options, size, noise_level):
        tried["levels"] += 1
        check_levels(ratio, options, size, noise_level)

    plans()
    levels()
    with capsys.disabled():
        print(f"\nfuzz: {tried['plans']} matchings and plans, {tried['levels']} layouts of levels")
    assert tried["plans"] >= 10_000
