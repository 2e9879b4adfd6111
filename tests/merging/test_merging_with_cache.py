"""Merging together with a feature cache: ratios, plans and outputs by the kind of step."""

import copy

import pytest
import torch
from conftest import INPUTS, generate, make_pipeline

from tomesd_plus import (
    FullSteps,
    ToMeProcessor,
    apply_feature_cache,
    apply_token_merging,
    remove_feature_cache,
)
from tomesd_plus.merging.config import LAYERS

CACHES = {"interval": {"interval": 3}, "adaptive": {"interval": 3, "threshold": 1e9}}
FULL = [True, False, False, True, False, False]


def apply_both(pipe, first, cache, **options):
    if first == "cache":
        apply_feature_cache(pipe, **cache)
    report = apply_token_merging(pipe, **options)
    if first == "merging":
        apply_feature_cache(pipe, **cache)
    return report


@pytest.mark.parametrize("first", ["merging", "cache"])
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_cached_steps_have_a_ratio_of_their_own(pipe, first, cache):
    report = apply_both(pipe, first, cache, ratio=0.25, cached_ratio={1: 0.75, 2: 0.5})
    generate(pipe, num_inference_steps=6)
    assert [step.removed[1] for step in report.steps] == [0.25 if full else 0.75 for full in FULL]
    assert all(2 not in step.removed for step in report.steps)  # cached steps have no layer there


def test_the_order_of_applying_changes_no_bit(pipe):
    options = {"ratio": 0.25, "cached_ratio": 0.5, "full_steps": "cache", "plan_every": "cache"}
    pictures = []
    for first in ("merging", "cache"):
        twin = copy.deepcopy(pipe)
        apply_both(twin, first, CACHES["interval"], **options)
        pictures.append(generate(twin, num_inference_steps=6))
    assert torch.equal(*pictures)


def test_without_a_cache_the_ratio_of_cached_steps_does_nothing(pipe):
    plain = copy.deepcopy(pipe)
    apply_token_merging(plain, ratio=0.25)
    options = {"cached_ratio": 0.75, "plan_every": "cache", "full_steps": FullSteps("cache", 0.5)}
    apply_token_merging(pipe, ratio=0.25, **options)
    assert torch.equal(generate(pipe), generate(plain))
    apply_feature_cache(pipe, interval=2)
    apply_feature_cache(plain, interval=2)
    assert not torch.equal(generate(pipe), generate(plain))
    remove_feature_cache(pipe)
    remove_feature_cache(plain)
    assert torch.equal(generate(pipe), generate(plain))


@pytest.mark.parametrize("first", ["merging", "cache"])
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_full_steps_can_stay_untouched(pipe, first, cache):
    plain = copy.deepcopy(pipe)
    apply_feature_cache(plain, **cache)
    untouched = near_steps(plain.unet)
    apply_token_merging(plain, ratio=0, cached_ratio=0.5)
    copied = near_steps(plain.unet)
    report = apply_both(pipe, first, cache, ratio=0.5, full_steps="cache")
    kept = near_steps(pipe.unet)
    assert [bool(step.removed) for step in report.steps] == [not full for full in FULL]
    assert torch.equal(kept[3], untouched[3])
    for index in (1, 2, 4, 5):
        error, other = ((r[index] - untouched[index]).square().mean() for r in (kept, copied))
        assert 0 < error < other / 2


@torch.no_grad()
def near_steps(unet):
    """Outputs at noise levels so near that little changes between them."""
    return [
        unet(INPUTS["sample"], timestep, INPUTS["encoder_hidden_states"]).sample
        for timestep in torch.tensor([900, 895, 890, 885, 880, 875])
    ]


def test_only_what_runs_on_cached_steps_is_kept(pipe):
    report = apply_token_merging(pipe, ratio=0.5, full_steps="cache")
    apply_feature_cache(pipe, interval=6, branch=0)
    generate(pipe, num_inference_steps=4, height=32, width=32)
    outer = 2 * 256 * 16 * 4  # bytes of the last layer's output
    assert report.kept_bytes == outer


@pytest.mark.parametrize("first", ["merging", "cache"])
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("metric", ["attention_input", "block_input"])
def test_layers_that_cached_steps_skip_can_merge_self_attention_on_full_ones(pipe, first, cache, metric):
    options = {"cached_ratio": 0.75, "plan_per": "block", "metric": metric,
               "layers": LAYERS}  # fmt: skip
    plain = copy.deepcopy(pipe)
    whole = apply_both(plain, first, cache, ratio=0, full_steps="cache", **options)
    report = apply_both(pipe, first, cache, ratio=0, full_steps=FullSteps("cache", 0.25), **options)
    differ = [not torch.equal(a, b) for a, b in zip(near_steps(pipe.unet), near_steps(plain.unet), strict=True)]
    assert differ == [True] * 6  # cached steps take what the full ones have left
    assert [step.removed[1] for step in report.steps] == [0.25 if full else 0.75 for full in FULL]
    assert [step.removed.get(1) for step in whole.steps] == [None if full else 0.75 for full in FULL]
    assert report.kept_bytes == whole.kept_bytes > 0
    for layer in report.layers:
        last, attention = layer.name.startswith("up_blocks.1.attentions.1"), layer.name.endswith("attn1")
        if layer.downsample != 1:
            assert (
                "level 2" in str(layer.reason)
                if attention
                else str(layer.reason) == "its block's attention was not merged"
            )
        else:
            assert (layer.calls, layer.share) == ((6, 0.5) if last else (2, 0.25 if attention else 0)), layer.name
            assert str(layer.reason) == ("None" if last or attention else "the step is a full one"), layer.name


def matchings(monkeypatch):
    from tomesd_plus.merging import planner

    count = []
    match = planner.match
    monkeypatch.setattr(planner, "match", lambda *args, **kwargs: count.append(0) or match(*args, **kwargs))
    return count


@pytest.mark.parametrize(("options", "expected"), [
    ({}, [2, 1, 1, 2, 1, 1]),  # two stages have layers at the level, and one of them runs on cached steps
    ({"plan_every": "cache"}, [2, 0, 0, 2, 0, 0]),
    ({"plan_every": "cache", "cached_ratio": 0.25}, [2, 1, 0, 2, 1, 0]),
])  # fmt: skip
def test_cached_steps_take_the_plans_of_the_full_step(pipe, monkeypatch, options, expected):
    apply_token_merging(pipe, ratio=0.5, **options)
    apply_feature_cache(pipe, interval=3, branch=0)
    count, per_step = matchings(monkeypatch), []

    def end_of_step(pipe, step, timestep, tensors):
        per_step.append(len(count))
        count.clear()
        return tensors

    generate(pipe, num_inference_steps=6, callback_on_step_end=end_of_step)
    assert per_step == expected


def test_each_guidance_branch_keeps_its_own_plans(pipe, monkeypatch):
    unet = pipe.unet
    apply_token_merging(unet, ratio=0.5, plan_every="cache")
    apply_feature_cache(unet, interval=3)
    count = matchings(monkeypatch)
    per_step = []
    with torch.no_grad():
        for timestep in torch.tensor([900, 800, 700, 600]):
            for sign in (1, -1):
                unet(sign * INPUTS["sample"], timestep, INPUTS["encoder_hidden_states"])
            per_step.append(len(count))
            count.clear()
    assert per_step[0] == per_step[3] > 0
    assert per_step[1:3] == [0, 0]


def test_compiled_layers_know_the_kind_of_step_too(pipe):
    apply_both(pipe, "merging", CACHES["interval"], ratio=0.25, cached_ratio=0.75, full_steps="cache")
    eager = generate(pipe, num_inference_steps=3)
    torch.compiler.reset()
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.allclose(generate(pipe, num_inference_steps=3), eager, atol=1e-5)


def test_compiled_layers_run_on_all_tokens_on_full_steps(pipe):
    plain = copy.deepcopy(pipe)
    apply_both(plain, "merging", CACHES["interval"], ratio=0.25, full_steps="cache")
    apply_both(pipe, "merging", CACHES["interval"], ratio=0.25, full_steps=FullSteps("cache", 0.5))
    assert not torch.equal(generate(pipe, num_inference_steps=3), expected := generate(plain, num_inference_steps=3))
    torch.compiler.reset()
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.allclose(generate(pipe, num_inference_steps=3), expected, atol=1e-5)


def test_two_attachments_with_an_adaptive_cache(pipe):
    report = apply_token_merging(pipe, ratio=0.5)
    other = ToMeProcessor(ratio=0.25)
    pipe.unet.up_blocks[-1].attentions[-1].transformer_blocks[0].attn1.set_processor(other)
    apply_feature_cache(pipe, interval=3, threshold=1e9, branch=2)
    for _ in range(2):  # the second attachment finds its model at its first call
        generate(pipe, num_inference_steps=4)
    assert all(step.removed.get(1) == 0.5 for step in report.steps)
    assert [step.removed.get(1) for step in other.attachment.record.value.steps] == [0.25] * 4


def test_a_controlnet_has_no_cached_steps_and_keeps_nothing_for_them():
    pipe = make_pipeline("controlnet")
    report = apply_token_merging(pipe, ratio=0.5, full_steps="cache")
    apply_feature_cache(pipe, interval=6, branch=0)
    generate(pipe, num_inference_steps=4, image=torch.zeros(1, 3, 32, 32), height=32, width=32)
    assert report.kept_bytes == 2 * 256 * 16 * 4  # the UNet's last layer


def test_another_models_layers_keep_nothing(pipe):
    processor = ToMeProcessor(ratio=0.5, full_steps="cache")
    other = copy.deepcopy(pipe)
    pipe.unet.set_attn_processor(processor)
    apply_feature_cache(pipe, interval=3)
    generate(pipe)
    other.unet.set_attn_processor(processor)
    with pytest.warns(UserWarning, match="serves another"):
        generate(other)


def test_sdxl_caches_and_merges_too():
    pipe = make_pipeline("sdxl")
    report = apply_both(pipe, "merging", {"interval": 2, "branch": 3}, ratio=0.25, cached_ratio=0.5, max_downsample=2)
    generate(pipe, num_inference_steps=4)
    assert [step.removed.get(2) for step in report.steps] == [0.25, 0.5, 0.25, 0.5]
