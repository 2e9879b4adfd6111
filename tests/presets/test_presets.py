"""Presets by name: what they switch on, and that they leave nothing behind."""

import pytest
import torch
from cache_tools import kinds
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

MERGING = [name for name, chosen in PRESETS.items() if chosen.merging is not None]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_does_what_its_parts_do(pipe, name):
    plain = generate(pipe, num_inference_steps=6)
    with preset(pipe, name, force=True):
        picture = generate(pipe, num_inference_steps=6)
    assert not torch.equal(picture, plain)
    assert torch.equal(generate(pipe, num_inference_steps=6), plain)
    parts = PRESETS[name]
    if parts.merging is not None:
        apply_token_merging(pipe, parts.merging)
    apply_feature_cache(pipe, parts.cache)
    assert torch.equal(generate(pipe, num_inference_steps=6), picture)


@pytest.mark.parametrize("name", MERGING)
def test_presets_merge_on_sdxl_too(name):
    pipe = make_pipeline("sdxl")
    report = apply_preset(pipe, name, force=True)
    generate(pipe, num_inference_steps=6)
    for merged, cached in zip(report.merging.steps, report.cache.steps, strict=True):
        assert bool(merged.removed) == cached.full  # its outer layers have no attention


@pytest.mark.parametrize(
    ("name", "pattern"), [("quality", "FcFcFcFcFF"), ("balanced", "FcsFcsFcsF"), ("fast", "FscsFscsFF")]
)
def test_the_reports_follow(pipe, name, pattern):
    report = apply_preset(pipe, name, force=True)
    generate(pipe, num_inference_steps=10)
    assert kinds(report.cache) == pattern
    assert "cached steps" in str(report) and (report.merging is None) == (name not in MERGING)
    for merged, letter in zip(report.merging.steps if report.merging else (), pattern):
        assert merged.removed == {"F": {1: 0.5}, "c": {1: 0.75}, "s": {}}[letter]


def test_controlnets_are_left_untouched():
    pipe = make_pipeline("controlnet")
    plain = generate(pipe, num_inference_steps=1)
    report = apply_preset(pipe, "fast", force=True)
    assert not torch.equal(generate(pipe, num_inference_steps=1), plain)  # a full step merges inside
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
        apply_preset(pipe, "fast", force=True)
    assert torch.equal(generate(pipe), cached)
    remove_feature_cache(pipe)
    apply_token_merging(pipe, ratio=0.5)
    with pytest.raises(ValueError, match="already"):
        apply_preset(pipe, "fast", force=True)
