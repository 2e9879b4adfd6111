"""What the report tells: the layers that merged, and a map of what was merged."""

import pytest
from conftest import INPUTS, generate, make_unet

from tomesd_plus import (
    apply_token_merging,
)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, {"attn1"}),
        ({"layers": ["self_attention", "cross_attention"]}, {"attn1", "attn2"}),
        ({"layers": ["self_attention", "mlp"], "metric": "block_input"}, {"attn1", "ff"}),
        ({"layers": ["mlp"]}, {"ff"}),
        ({"sides": "keys_values"}, {"attn1"}),
        ({"sides": "queries"}, {"attn1"}),
    ],
)
def test_the_report_names_the_layers_that_merged(options, layers):
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, **options)
    unet(**INPUTS, timestep=700)
    assert {layer.name.rsplit(".", 1)[1] for layer in report.layers if layer.removed} == layers
    self_attention = {layer.name: layer.reason for layer in report.layers if layer.name.endswith("attn1")}
    assert len(self_attention) == (7 if "attn1" in layers else 0)
    assert sum(reason is None for reason in self_attention.values()) == (3 if "attn1" in layers else 0)


def test_a_merge_map_shows_groups_at_their_places(pipe):
    report = apply_token_merging(pipe, ratio=0.5)
    maps = []
    generate(
        pipe, height=32, width=24, callback_on_step_end=lambda p, i, t, tensors: maps.append(report.merge_map()) or {}
    )
    assert [m.shape for m in maps] == [(16, 12)] * len(maps)
    groups = sum((maps[0] == size).sum().item() / size for size in range(1, 200))
    assert groups == pytest.approx(16 * 12 - int(16 * 12 * 0.5))
    assert report.merge_map(level=2) is None
