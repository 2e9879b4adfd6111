"""The report, and which patches went together."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vision_tools import LAYERS, PATCHES, forward, make_tower, pictures
from tomesd_plus import TowerReport, apply_token_merging
from tomesd_plus.vision.picture import draw_groups


def test_before_the_first_call_there_is_nothing_to_tell():
    report = apply_token_merging(make_tower())
    assert isinstance(report, TowerReport) and not report.merged and report.layers == []
    assert str(report) == "Token merging: the model has not run yet."
    with pytest.raises(ValueError, match="call the model first"):
        report.source_map()


def test_groups_are_those_whose_output_is_one():
    model = make_tower("deit")
    report = apply_token_merging(model, r=9)
    output = forward(model)[:, 2:]
    for layer in range(LAYERS):
        groups = report.source_map(layer)
        assert groups.shape == (2, 8, 8) and groups.dtype == torch.int64 and groups.device.type == "cpu"
        assert all(len(one.unique()) == PATCHES - 9 * (layer + 1) for one in groups)
    for values, groups in zip(output, report.source_map().flatten(1), strict=True):
        same = (values[:, None] == values).all(-1)
        assert torch.equal(same, groups[:, None] == groups)
    assert torch.equal(report.source_map(-1), report.source_map(LAYERS - 1))


def test_nothing_merged_is_a_map_of_single_patches():
    model = make_tower()
    report = apply_token_merging(model, r=[0, 0, 0, 3])
    forward(model)
    assert torch.equal(report.source_map(0), torch.arange(PATCHES).reshape(1, 8, 8).expand(2, -1, -1))


@pytest.mark.parametrize("layer", [LAYERS, -LAYERS - 1, True])
def test_there_is_no_such_layer(layer):
    model = make_tower()
    report = apply_token_merging(model)
    forward(model)
    with pytest.raises(ValueError, match="has 4 layers"):
        report.source_map(layer)
    with pytest.raises(ValueError, match="had 2 pictures"):
        report.source_picture(pictures()[0], sample=2)
    with pytest.raises(ValueError, match="no tower 'x'"):
        report.source_map(tower="x")


def test_the_picture_has_mean_colours_and_outlines():
    groups = np.array([[0, 0], [1, 2]])
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16, :16] = 200
    drawn = np.asarray(draw_groups(groups, Image.fromarray(pixels)))
    assert drawn.shape == (32, 32, 3)
    assert (abs(drawn[2:14, 2:30].astype(int) - 100) <= 1).all()  # the mean of 200 and 0
    assert (drawn[16] == 255).all() and (drawn[17:, 16] == 255).all() and (drawn[20:, 2:14] <= 20).all()


def test_pictures_are_taken_as_the_model_takes_them():
    model = make_tower()
    report = apply_token_merging(model)
    forward(model)
    for picture in (pictures()[1], pictures()[1].numpy(), Image.new("L", (300, 200)), np.zeros((9, 9, 3), np.uint8)):
        drawn = report.source_picture(picture, sample=1)
        assert drawn.mode == "RGB" and drawn.width == drawn.height >= 64
    with pytest.raises(ValueError, match=r"not of shape \(4, 4\)"):
        report.source_picture(torch.zeros(4, 4))
