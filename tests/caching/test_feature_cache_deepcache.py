"""The feature cache beside the DeepCache package, and both beside token merging."""

import pytest
import torch
from conftest import generate, hooks, level_of, make_pipeline, make_unet
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from tomesd_plus import ToMeProcessor, apply_token_merging, remove_token_merging, token_merging
from tomesd_plus.caching import apply_feature_cache, feature_cache, remove_feature_cache

DeepCache = pytest.importorskip("DeepCache")

STEPS = 6


def deep_cache(pipe, interval=3, branch=0):
    helper = DeepCache.DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    return helper


def pipeline(kind):
    """As deep as the real ones: SD with a last block without attention, SDXL with a first one without."""
    pipe = make_pipeline(kind)
    options = {"layers_per_block": 2, "block_out_channels": (16, 32, 32)}
    if kind == "sdxl":
        options |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64, "transformer_layers_per_block": (1, 1, 2),
        }  # fmt: skip
    else:
        options |= {
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        }
    pipe.unet = make_unet(**options)
    return pipe


@pytest.mark.parametrize(
    ("scheduler", "branch"),
    [(DDIMScheduler, branch) for branch in range(9)]
    + [
        (scheduler, branch) for scheduler in (EulerDiscreteScheduler, DPMSolverMultistepScheduler) for branch in (0, 4)
    ],
)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_bits_are_those_of_deep_cache(kind, scheduler, branch):
    pipe = pipeline(kind)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    interval = 2 + branch % 2
    helper = deep_cache(pipe, interval, branch)
    expected = generate(pipe, num_inference_steps=STEPS)
    helper.disable()
    report = apply_feature_cache(pipe, interval=interval, branch=branch)
    cached = generate(pipe, num_inference_steps=STEPS)
    assert torch.equal(cached, expected) and report.full == STEPS // interval
    remove_feature_cache(pipe)
    assert not torch.equal(generate(pipe, num_inference_steps=STEPS), cached)


@pytest.mark.parametrize("kind", ["img2img", "controlnet"])
@pytest.mark.parametrize("branch", [0, 1, 3])
def test_bits_are_those_of_deep_cache_in_other_pipelines(kind, branch):
    pipe = make_pipeline(kind)
    helper = deep_cache(pipe, 2, branch)
    expected = generate(pipe, num_inference_steps=STEPS)
    helper.disable()
    with feature_cache(pipe, interval=2, branch=branch) as report:
        assert torch.equal(generate(pipe, num_inference_steps=STEPS), expected) and report.cached


# With token merging -------------------------------------------------------------------------------------------------


def shares(report, level):
    """The share of tokens removed at each step, and how often layers ran in all."""
    return [step.removed.get(level) for step in report.steps], sum(layer.calls for layer in report.layers)


def test_merging_works_on_full_and_cached_steps(any_pipe):
    level = level_of(any_pipe)
    branch = 3 * (level - 1)  # so that cached steps run attention at this level
    options = {"ratio": {level: 0.5}, "layers": ["self_attention", "mlp"]}
    with token_merging(any_pipe, **options) as merging:
        merged = generate(any_pipe)
        _, calls = shares(merging, level)
    with feature_cache(any_pipe, interval=2, branch=branch) as caching:
        cached = generate(any_pipe)
        merging = apply_token_merging(any_pipe, **options)
        both = generate(any_pipe)
    removed, calls_of_both = shares(merging, level)
    assert len(removed) == caching.full + caching.cached and caching.cached
    assert removed == pytest.approx([0.5] * len(removed), abs=0.01) and calls_of_both < calls
    assert not torch.equal(both, merged) and not torch.equal(both, cached)
    assert (both - cached).abs().mean() < 0.05


@pytest.mark.parametrize(
    "options", [{}, {"plan_per": "level"}, {"layers": ["self_attention", "mlp"], "metric": "block_input"}]
)
@pytest.mark.parametrize("cache_comes_first", [True, False])
@pytest.mark.parametrize("cache_goes_first", [True, False])
def test_either_order_of_applying_and_removing(pipe, cache_comes_first, cache_goes_first, options):
    def cache():
        return apply_feature_cache(pipe, interval=2, branch=1)

    def merge():
        return apply_token_merging(pipe, ratio=0.5, **options)

    plain = generate(pipe)
    cache()
    alone = {"cache": generate(pipe)}
    remove_feature_cache(pipe)
    merge()
    alone["merging"] = generate(pipe)
    cache()
    both = generate(pipe)
    remove_feature_cache(pipe)
    assert torch.equal(generate(pipe), alone["merging"])
    remove_token_merging(pipe)

    for apply in (cache, merge) if cache_comes_first else (merge, cache):
        apply()
    assert torch.equal(generate(pipe), both)
    if cache_goes_first:
        remove_feature_cache(pipe)
        assert torch.equal(generate(pipe), alone["merging"])
        remove_token_merging(pipe)
    else:
        remove_token_merging(pipe)
        assert torch.equal(generate(pipe), alone["cache"])
        remove_feature_cache(pipe)
    assert torch.equal(generate(pipe), plain) and not hooks(pipe)
    assert len({tuple(p.flatten().tolist()) for p in (plain, both, *alone.values())}) == 4


def test_a_processor_set_by_hand(pipe):
    with feature_cache(pipe, interval=2) as report:
        cached = generate(pipe)
        pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5))
        first = generate(pipe)
        assert not torch.equal(first, cached) and report.cached == 2
        assert torch.equal(generate(pipe), first)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("merging_comes_first", [True, False])
def test_merging_under_the_deep_cache_package(kind, merging_comes_first):
    pipe = pipeline(kind)
    level = level_of(pipe)
    branch = 3 * (level - 1)
    options = {"ratio": {level: 0.5}, "layers": ["self_attention", "mlp"]}
    with feature_cache(pipe, interval=2, branch=branch), token_merging(pipe, **options):
        ours = generate(pipe)
    if merging_comes_first:
        report = apply_token_merging(pipe, **options)
    helper = deep_cache(pipe, 2, branch)
    if not merging_comes_first:
        cached = generate(pipe)
        helper.disable()
        helper = deep_cache(pipe, 2, branch)
        report = apply_token_merging(pipe, **options)
    merged = generate(pipe)
    removed, _ = shares(report, level)
    assert removed == pytest.approx([0.5] * 4, abs=0.01)
    assert torch.equal(merged, ours)
    remove_token_merging(pipe)
    helper.disable()
    if not merging_comes_first:
        assert not torch.equal(merged, cached)
