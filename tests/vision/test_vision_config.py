"""How many tokens each layer loses, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.vision_tools import LAYERS, PATCHES, forward, make_tower, pictures
from tomesd_plus import AdaptiveRatio, apply_token_merging
from tomesd_plus.vision import TowerConfig


def removed(layers, patches=196, **options):
    config = TowerConfig(**options)
    return [config.removed(layer, layers, patches) for layer in range(layers)]


def test_r_is_constant_growing_falling_or_a_list():
    assert removed(12) == [16] * 12
    assert removed(12, r=8) == removed(12, r=(8, 0)) == [8] * 12
    falling = removed(12, r=(8, -1))
    assert falling[0] == 16 and falling[-1] == 0 and falling == sorted(falling, reverse=True)
    assert removed(12, r=(8, 1)) == [int(16 * layer / 11) for layer in range(12)]
    assert removed(3, r=[5, 0, 1]) == [5, 0, 1]
    assert removed(1, r=(7, -1)) == [7]


@given(st.floats(0, 0.999), st.integers(1, 40), st.integers(1, 1500))
def test_a_ratio_is_removed_in_all_and_evenly(ratio, layers, patches):
    counts = removed(layers, patches, ratio=ratio)
    assert sum(counts) == int(ratio * patches) and max(counts) - min(counts) <= 1


def test_neither_running_nor_the_callers_list_changes_r():
    model, r = make_tower(), [6, 5, 4, 3]
    report = apply_token_merging(model, r=r)
    r[0] = 0
    for _ in range(3):
        forward(model)
        assert [layer.removed for layer in report.layers] == [6, 5, 4, 3]


def test_ratio_removes_that_share():
    model = make_tower()
    report = apply_token_merging(model, ratio=0.5)
    forward(model)
    assert report.removed == 0.5 and [layer.removed for layer in report.layers] == [PATCHES // 8] * LAYERS


def test_what_is_more_than_half_is_cut_and_told():
    model = make_tower()
    report = apply_token_merging(model, r=40)
    forward(model)
    assert [layer.removed for layer in report.layers] == [32, 16, 8, 4]
    assert "40 were asked for, 32 can go" in report.left_alone["layers.0"] and "40 were asked" in str(report)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"r": 0.5}, TypeError, "give a share of the patches as ratio="),
        ({"r": True}, TypeError, "not True"),
        ({"r": -1}, ValueError, "must not be negative"),
        ({"r": "8"}, TypeError, "a number, a list of numbers or"),
        ({"r": [1, 2]}, ValueError, "r has 2 numbers, but the tower has 4 layers"),
        ({"r": (8, -2)}, ValueError, r"inflection must lie in \[-1, 1\]"),
        ({"r": (8, float("nan"))}, ValueError, "inflection must lie"),
        ({"r": (8, 1, 1)}, TypeError, "as a list"),
        ({"ratio": 1}, ValueError, "below 1"),
        ({"ratio": float("nan")}, ValueError, "ratio must lie"),
        ({"ratio": AdaptiveRatio()}, TypeError, "ratio is a number"),
        ({"similarity": 1.5}, ValueError, "similarity must lie"),
        ({"similarity": 0.9, "method": "evit"}, ValueError, "for method='merging' only"),
        ({"r": 8, "ratio": 0.5}, TypeError, "one of r, ratio and similarity, not r and ratio"),
        ({"method": "prune"}, ValueError, "choose from merging, evit, ats"),
        ({"proportional_attention": "yes"}, TypeError, "True, False or None"),
        ({"proportional_attention": 0}, TypeError, "True, False or None, not 0"),
        ({"proportional_attention": 1.0}, TypeError, "True, False or None"),
        ({"proportional_attention": torch.ones(2)}, TypeError, "True, False or None"),
        ({"method": ["merging"]}, ValueError, r"unknown method \['merging'\]: choose from"),
        ({"r": b"abcd"}, TypeError, "a number, a list of numbers or"),
        ({"r": np.array([1, 2, 3, 4])}, TypeError, "a number, a list of numbers or"),
        ({"r": (10**400, 1)}, ValueError, "a number of tokens, at most 2147483647"),
        ({"ratio": 10**400}, ValueError, "ratio must lie"),
        ({"protect": "abc"}, TypeError, "a mask of bools.* not 'abc'"),
        ({"protect": object()}, TypeError, "a mask of bools.* not <object"),
        ({"protect": [[True], [True, False]]}, TypeError, "a mask of bools.* not .*expected sequence of length 1"),
        ({"protect": [1, 2]}, TypeError, "a mask of bools"),
        ({"protect": torch.zeros(0, dtype=torch.bool)}, TypeError, "a mask of bools"),
    ],
)
def test_wrong_options_are_refused_in_words(options, error, words):
    model = make_tower()
    with pytest.raises(error, match=words):
        apply_token_merging(model, **options)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("shape", [(5, 5), (4, 16), (2, 4, 16), (3, 8, 8), (63,)])
def test_a_mask_of_another_size_is_refused_when_the_model_is_called(shape):
    model = make_tower()
    apply_token_merging(model, protect=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError) as error:
        model(pictures())
    assert f"protect has shape {shape}, which does not fit 64 patches, 8 × 8, in each of 2 pictures" in str(error)


def test_a_mask_that_lies_on_its_side_is_refused():
    model, mask = make_tower("dinov2"), torch.ones(6, 10, dtype=torch.bool)
    report = apply_token_merging(model, protect=mask)
    forward(model, pictures(2, 24, 40))
    assert not report.merged
    with pytest.raises(ValueError, match=r"protect has shape \(6, 10\), .* 60 patches, 10 × 6,"):
        forward(model, pictures(2, 40, 24))
