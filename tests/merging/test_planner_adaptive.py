"""Adaptive ratios: as many tokens are removed as are in fact alike."""

import warnings

import pytest
import torch
from conftest import INPUTS, OneLayer, attention_layer, make_unet, merge_in

from tomesd_plus import AdaptiveRatio, apply_feature_cache, apply_token_merging, remove_token_merging
from tomesd_plus.merging import planner


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
        attachment = merge_in(layer, ratio=AdaptiveRatio(similarity=0.95, ratios=(0, 0.25, 0.5, 0.75)))
        layer(x)
        removed[name] = [record.removed / record.tokens for record in attachment.record.value.layers.values()]
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


@pytest.mark.parametrize("plan_per", ["block", "stage", "level"])
def test_that_nothing_is_alike_is_found_out_once(plan_per, monkeypatch):
    counts = []
    match = planner.match
    monkeypatch.setattr(planner, "match", lambda *args: counts.append(1) or match(*args))
    unet = make_unet()
    apply_token_merging(unet, ratio=AdaptiveRatio(similarity=1.0), plan_per=plan_per, plan_every=2)
    for timestep in torch.tensor([900, 800]):
        unet(**INPUTS, timestep=timestep)
    assert len(counts) == {"block": 3, "stage": 2, "level": 1}[plan_per]


def test_all_that_can_be_removed_is_removed_at_odd_sizes_too():
    x = torch.ones(2, 65 * 65, 16)
    layer = OneLayer(attention_layer()[0])
    attachment = merge_in(layer, size=(65, 65), ratio=AdaptiveRatio())
    layer(x)
    assert attachment.record.value.steps[-1].removed == {1: 32 * 32 * 3 / 65**2}


def test_a_cached_steps_own_ratio_needs_no_likeness():
    """A full step on which nothing was alike does not stop its cached steps, nor do their plans serve it."""
    unet = make_unet()
    apply_feature_cache(unet, interval=2)
    report = apply_token_merging(unet, ratio=AdaptiveRatio(similarity=1.0), cached_ratio=0.5, plan_every="cache")
    with torch.no_grad():
        for timestep in torch.tensor([900, 800, 700, 600]):
            unet(**INPUTS, timestep=timestep)
    assert [step.removed for step in report.steps] == [{}, {1: 0.5}] * 2


def test_compiled_with_graph_breaks():
    unet, eager = make_unet(), make_unet()
    for model in (unet, eager):
        apply_token_merging(model, ratio=AdaptiveRatio(0.6), plan_per="block")
    torch.compiler.reset()
    unet.compile_repeated_blocks(fullgraph=False, backend="eager")
    with torch.no_grad():
        for timestep in torch.tensor([900, 500]):
            expected = eager(**INPUTS, timestep=timestep).sample
            torch.testing.assert_close(unet(**INPUTS, timestep=timestep).sample, expected)
    torch.compiler.reset()


def test_a_model_without_the_level_warns():
    unet = make_unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                     up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    report = apply_token_merging(unet, ratio=AdaptiveRatio(similarity=-1.0))
    unet(**INPUTS, timestep=700)
    with pytest.warns(UserWarning, match="max_downsample=2"):
        assert not report.merged


def test_gradient_checkpointing_decides_as_the_forward_did():
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet().train()
        report = apply_token_merging(unet, ratio=AdaptiveRatio(0.77, (0.36,)), plan_per="level")
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(**INPUTS, timestep=500).sample.square().mean().backward()
        gradients.append([p.grad for p in unet.parameters()])
    assert not any(layer.removed for layer in report.layers)  # the first block's tokens decide, in both runs
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)
