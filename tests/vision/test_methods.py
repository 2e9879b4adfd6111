"""Pruning, sampling, adaptive merging, protected patches: against what is written out here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import vision_tools
from tests.vision_tools import KINDS, LAYERS, PATCHES, WITH_CLASS_TOKEN, forward, make_tower, pictures
from tomesd_plus import apply_token_merging, remove_token_merging
from tomesd_plus.matching import keep_sampled, sample, significance


@torch.no_grad()
def first_layer(model):
    """Tokens after the first layer's attention, and what its class token attends to, (batch, heads, tokens)."""
    model.set_attn_implementation("eager")
    output = model(pictures(), output_hidden_states=True, output_attentions=True)
    x = output.hidden_states[0]
    y, _ = vision_tools._attention(vision_tools.layers_of(model)[0], x, torch.ones(*x.shape[:2], 1), None)
    return x + y, output.attentions[0][:, :, 0]


def test_evit_keeps_what_the_class_token_attends_to_and_fuses_the_rest():
    model, removed = make_tower("vit"), 20
    x, attention = first_layer(model)
    scores = attention.mean(1)[:, 1:]
    report = apply_token_merging(model, r=[removed, 0, 0, 0], method="evit")
    with torch.no_grad():
        output = model(pictures(), output_hidden_states=True).hidden_states[1]
        for sample_index in range(2):
            order = scores[sample_index].argsort(descending=True)
            stays, goes = order[: PATCHES - removed - 1].sort().values + 1, order[PATCHES - removed - 1 :] + 1
            weight = scores[sample_index, goes - 1][:, None]
            fused = (x[sample_index, goes] * weight).sum(0) / weight.sum()
            tokens = torch.cat([x[sample_index, :1], x[sample_index, stays], fused[None]])[None]
            tokens = (tokens + vision_tools._mlp(model.layers[0], tokens))[0]
            expected = torch.empty_like(output[sample_index])
            expected[0], expected[stays], expected[goes] = tokens[0], tokens[1:-1], tokens[-1]
            torch.testing.assert_close(output[sample_index], expected, atol=1e-5, rtol=0)
            groups = report.source_map()[sample_index].flatten()
            assert len(groups[goes - 1].unique()) == 1 and len(groups.unique()) == PATCHES - removed


@pytest.mark.parametrize("kind", WITH_CLASS_TOKEN)
@pytest.mark.parametrize("method", ["evit", "ats"])
def test_selection_runs_in_every_family_with_a_class_token(kind, method):
    model = make_tower(kind)
    untouched = forward(model)
    report = apply_token_merging(model, r=8, method=method)
    output = forward(model)
    assert output.shape == untouched.shape and (output - untouched).abs().max() > 1e-2
    assert torch.equal(forward(model), output)
    removed = [layer.removed for layer in report.layers]
    assert removed == [8] * LAYERS


@pytest.mark.parametrize("fixed", [True, False])
def test_ats_keeps_the_tokens_that_it_meets(fixed):
    model, removed = make_tower("vit"), 24
    _, attention = first_layer(model)
    with torch.no_grad():
        hidden = model.layers[0].layernorm_before(model(pictures(), output_hidden_states=True).hidden_states[0])
        values = model.layers[0].attention.v_proj(hidden).unflatten(-1, (4, -1)).norm(dim=-1).transpose(1, 2)
    report = apply_token_merging(model, r=[removed, 0, 0, 0] if fixed else None, method="ats")
    forward(model)
    score = (attention * values).sum(1)[:, 1:]
    total = (score / score.sum(1, keepdim=True)).cumsum(1)
    points = PATCHES - removed if fixed else PATCHES
    kept = len(report.source_map(0)[0].unique())
    met = [
        {int((total[i] < (2 * point + 1) / (2 * points)).sum()) for point in range(points)} for i in range(len(total))
    ]
    most = max(map(len, met))
    step = PATCHES // 16
    assert kept == (points if fixed else min(PATCHES, -(-most // step) * step)) and most < PATCHES
    for one, groups in zip(met, report.source_map(0).flatten(1), strict=True):
        assert len(groups[sorted(one)].unique()) == len(one)  # each stands for itself


@given(st.integers(0, 2**30), st.integers(1, 12), st.floats(0.1, 5))
def test_sampling_meets_more_where_scores_are_even(seed, points, spread):
    generator = torch.Generator().manual_seed(seed)
    attention = (torch.randn(2, 3, 13, generator=generator) * spread).softmax(-1)
    score = significance(attention, torch.rand(2, 3, 13, generator=generator) + 0.1, leading=1)
    torch.testing.assert_close(score.sum(1), torch.ones(2))
    met, counts = sample(score, points)
    assert (met.sum(1) == counts).all() and counts.min() >= 1 and counts.max() <= points
    left = int(counts.max())
    plan = keep_sampled(met, score, torch.randn(2, 13, 4, generator=generator), leading=1, left=left)
    assert plan.kept.shape == (2, left + 1) and plan.weights is None
    for one, kept in zip(met, plan.kept, strict=True):
        assert set((one.nonzero().flatten() + 1).tolist()) <= set(kept.tolist())


def test_adaptive_merging_looks_at_the_pictures():
    model = make_tower()
    model.layers[0].attention.k_proj.bias.data.zero_()
    busy, plain = pictures(), torch.full_like(pictures(), 0.3)
    report = apply_token_merging(model, similarity=0.8)
    counts = {}
    for name, batch in (("busy", busy), ("plain", plain)):
        assert forward(model, batch).shape == (2, PATCHES + 1, 32)
        counts[name] = [layer.removed for layer in report.layers]
        assert all(count % (PATCHES // 16) == 0 for count in counts[name])  # few sizes
    assert sum(counts["plain"]) > sum(counts["busy"])
    remove_token_merging(model)
    report = apply_token_merging(model, similarity=1)
    untouched = forward(make_tower(), busy)
    assert forward(model, busy).shape == untouched.shape and not report.merged
    assert "too few tokens have a partner of similarity 1" in str(report)


@pytest.mark.parametrize("method", ["merging", "evit", "ats"])
@pytest.mark.parametrize("shape", [(PATCHES,), (8, 8), (2, 8, 8)])
def test_protected_patches_stay_alone(method, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.3
    model = make_tower("dinov2 registers")
    report = apply_token_merging(model, r=9, method=method, protect=mask)
    forward(model)
    assert report.removed > 0.4
    masks = mask.reshape(2, PATCHES) if len(shape) == 3 else mask.reshape(1, PATCHES).expand(2, -1)
    for groups, protected in zip(report.source_map().flatten(1), masks, strict=True):
        counts = groups.bincount()
        assert (counts[groups[protected]] == 1).all()


def test_everything_protected_is_the_untouched_tower():
    model = make_tower()
    untouched = forward(model)
    report = apply_token_merging(model, r=8, protect=torch.ones(PATCHES, dtype=torch.bool))
    assert torch.equal(forward(model), untouched) and not report.merged and "0 can go" in str(report)


@pytest.mark.parametrize("method, options", [("merging", {"similarity": 0.5}), ("merging", {"r": 8}), ("ats", {})])
@pytest.mark.parametrize("free", [0, 1])
def test_nothing_goes_where_at_most_one_patch_may(free, method, options):
    model, mask = make_tower(), torch.arange(PATCHES) >= free
    untouched = forward(model)
    report = apply_token_merging(model, method=method, protect=mask, **options)
    assert torch.equal(forward(model), untouched) and not report.merged


@pytest.mark.parametrize("kind", KINDS)
def test_proportional_attention_counts(kind):
    outputs = {}
    for proportional in (None, True, False):
        model = make_tower(kind)
        apply_token_merging(model, r=12, proportional_attention=proportional)
        outputs[proportional] = forward(model)
    assert torch.equal(outputs[None], outputs[True])
    assert (outputs[True] - outputs[False]).abs().max() > 1e-3


def test_selection_is_refused_without_a_class_token():
    model = make_tower("siglip")
    for method in ("evit", "ats"):
        with pytest.raises(ValueError, match=r"looks at the class token, and .* has none: use method='merging'"):
            apply_token_merging(model, method=method)
