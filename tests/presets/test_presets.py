"""Presets by name: what they switch on, and that they leave nothing behind."""

import pytest
import torch
from conftest import generate, make_pipeline

from tomesd_plus import (
    PRESETS,
    ToMeProcessor,
    apply_feature_cache,
    apply_preset,
    apply_token_merging,
    preset,
    remove_feature_cache,
    remove_preset,
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_does_what_its_parts_do(pipe, name):
    plain = generate(pipe, num_inference_steps=6)
    with preset(pipe, name):
        picture = generate(pipe, num_inference_steps=6)
    assert not torch.equal(picture, plain)
    assert torch.equal(generate(pipe, num_inference_steps=6), plain)
    parts = PRESETS[name]
    apply_token_merging(pipe, parts.merging)
    apply_feature_cache(pipe, parts.cache)
    assert torch.equal(generate(pipe, num_inference_steps=6), picture)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_merge_on_sdxl_too(name):
    pipe = make_pipeline("sdxl")
    report = apply_preset(pipe, name)
    generate(pipe, num_inference_steps=6)
    for merged, cached in zip(report.merging.steps, report.cache.steps, strict=True):
        assert bool(merged.removed) == cached.full  # its outer layers have no attention


@pytest.mark.parametrize(("name", "full"), [("quality", {}), ("balanced", {}), ("fast", {1: 0.5})])
def test_the_reports_follow(pipe, name, full):
    report = apply_preset(pipe, name)
    generate(pipe, num_inference_steps=6)
    assert report.cache.full < len(report.cache.steps) == 6
    for merged, cached in zip(report.merging.steps, report.cache.steps, strict=True):
        assert merged.removed == (full if cached.full else {1: 0.75})
    assert "cached steps" in str(report)


def test_controlnets_are_left_untouched():
    pipe = make_pipeline("controlnet")
    plain = generate(pipe, num_inference_steps=1)
    report = apply_preset(pipe, "balanced")
    assert torch.equal(generate(pipe, num_inference_steps=1), plain)  # a full step
    generate(pipe, num_inference_steps=4)
    assert any(step.removed for step in report.merging.steps)
    assert not any(isinstance(p, ToMeProcessor) for p in pipe.controlnet.attn_processors.values())
    remove_preset(pipe)
    assert torch.equal(generate(pipe, num_inference_steps=1), plain)


def test_what_cannot_be_applied_changes_nothing(pipe):
    with pytest.raises(ValueError, match="quality, balanced, fast"):
        apply_preset(pipe, "best")
    apply_feature_cache(pipe, interval=2)
    cached = generate(pipe)
    with pytest.raises(ValueError, match="already applied"):
        apply_preset(pipe, "balanced")
    assert torch.equal(generate(pipe), cached)
    remove_feature_cache(pipe)
    apply_token_merging(pipe, ratio=0.5)
    with pytest.raises(ValueError, match="already"):
        apply_preset(pipe, "balanced")
