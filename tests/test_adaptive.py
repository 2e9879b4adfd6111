"""As many tokens as are in fact alike."""

import warnings

import pytest
import torch
from conftest import INPUTS, OneLayer, attention_layer, make_unet, merge_in

from tomesd_plus import AdaptiveRatio, apply_token_merging, remove_token_merging


def test_plain_pictures_lose_more_than_busy_ones():
    removed = {}
    for name, spread in {"plain": 1e-3, "half": None, "busy": 10.0}.items():
        attn, _ = attention_layer()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, 64, 16, generator=generator)
        x = torch.ones(2, 64, 16) + noise * (spread or 1e-3)
        if spread is None:
            x[:, 32:] = 10 * noise[:, 32:]
        layer = OneLayer(attn)
        merger = merge_in(layer, ratio=AdaptiveRatio(similarity=0.95, ratios=(0, 0.25, 0.5, 0.75)))
        layer(x)
        removed[name] = [record.removed / record.tokens for record in merger.records.values()]
    assert removed == {"plain": [0.75], "half": [0.25], "busy": [0.0]}


def test_the_report_shows_what_an_adaptive_ratio_chose():
    unet = make_unet()
    report = apply_token_merging(unet, ratio=AdaptiveRatio(similarity=-1.0, ratios=(0, 0.25, 0.5)))
    unet(**INPUTS, timestep=700)
    assert report.removed[1] == 0.5 and report.steps[0].removed == {1: 0.5}
    remove_token_merging(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing alike is no mistake of the user's
        report = apply_token_merging(unet, ratio=AdaptiveRatio(similarity=1.0))
        unet(**INPUTS, timestep=700)
    assert report.removed[1] == 0 and "too few tokens are alike" in str(report)


@pytest.mark.parametrize("options", [{"ratios": ()}, {"ratios": (0.5, 1.0)}, {"similarity": 1.5}])
def test_adaptive_ratios_out_of_range(options):
    with pytest.raises(ValueError, match=r"ratio|similarity"):
        AdaptiveRatio(**options)
