"""The feature cache: which steps are full, what the others skip, how it is applied and removed."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from cache_tools import forwards, kinds
from conftest import generate, hooks, make_pipeline, make_unet
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler

from tomesd_plus.caching import (
    FeatureCacheConfig,
    IntervalSchedule,
    apply_feature_cache,
    feature_cache,
)

# Full and cached steps ----------------------------------------------------------------------------------------------


def test_cached_steps_skip_the_inner_layers_and_the_report_says_so(any_pipe):
    plain = generate(any_pipe, num_inference_steps=6)
    calls = Counter()
    for name in ("mid_block.resnets.0", "down_blocks.0.resnets.0", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1"):
        convolution = any_pipe.unet.get_submodule(name).conv1
        convolution.register_forward_hook(lambda *_, name=name: calls.update([name]))
    report = apply_feature_cache(any_pipe, interval=2)
    assert "has not run yet" in str(report)
    cached = generate(any_pipe, num_inference_steps=6)
    pattern = "FcFc" if "Img2Img" in type(any_pipe).__name__ else "FcFcFc"
    assert kinds(report) == pattern and (report.full, report.cached) == (len(pattern) // 2,) * 2
    assert {calls.pop("up_blocks.1.resnets.1")} == {len(pattern)} and set(calls.values()) == {len(pattern) // 2}
    assert len(report.skipped_layers) >= 5 and "mid_block" in report.skipped_layers
    assert f"{report.full} full and {report.cached} cached steps" in str(report) and "interval" in str(report)
    assert not torch.equal(cached, plain) and (cached - plain).abs().mean() < 0.05


@pytest.mark.parametrize("scheduler", [DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler])
def test_interval_1_is_bit_identical(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    plain = generate(pipe)
    report = apply_feature_cache(pipe, 1)
    assert torch.equal(generate(pipe), plain) and report.cached == 0


def test_one_feature_map_is_kept(pipe):
    report = apply_feature_cache(pipe, interval=2)
    generate(pipe)
    assert report.kept_bytes == 2 * 16 * 16 * 16 * 4  # batch, channels, height, width, float32


def test_each_branch_runs_more_layers():
    unet, skipped = make_unet(layers_per_block=2), []
    for branch in range(6):
        with feature_cache(unet, interval=9, branch=branch) as report:
            skipped.append(sum(len(list(unet.get_submodule(name).modules())) for name in report.skipped_layers))
    assert skipped == sorted(skipped, reverse=True) and len(set(skipped)) == 6


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"interval": 4}, "FcccFcccFc"),
        ({"interval": IntervalSchedule((1, 4))}, "FFFFFcccFc"),
        ({"interval": IntervalSchedule((3, 1))}, "FccFcFFFFF"),
        ({"full_steps": (0, 1, 7)}, "FFcccccFcc"),
        ({"full_steps": [4]}, "FcccFccccc"),
        ({"threshold": 1e-6, "interval": 4}, "FFFFFFFFFF"),
        ({"threshold": 1e6, "interval": 4}, "FcccFcccFc"),
    ],
)
def test_full_steps_can_be_chosen(pipe, options, pattern):
    report = apply_feature_cache(pipe, **options)
    with pytest.warns(UserWarning, match="raise it") if set(pattern) == {"F"} else nullcontext():
        generate(pipe, num_inference_steps=10)
    assert kinds(report) == pattern


def test_an_adaptive_cache_follows_the_change_of_the_early_feature(pipe):
    report = apply_feature_cache(pipe, threshold=0.3, interval=9)
    generate(pipe, num_inference_steps=10)
    assert report.full > 1 and report.cached > 1
    assert report.steps[0].change is None
    for step in report.steps[1:]:
        assert step.full == (step.change > 0.3)
    assert f"{report.steps[1].change:.1%}" in str(report)
    first = kinds(report)
    generate(pipe, num_inference_steps=10)
    assert kinds(report) == first


# Applying and removing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"interval": 0}, ValueError), ({"interval": 2.5}, ValueError), ({"interval": True}, ValueError),
        ({"branch": -1}, ValueError), ({"branch": 6}, ValueError), ({"full_steps": (0, -1)}, ValueError),
        ({"threshold": 0}, ValueError), ({"threshold": 0.1, "full_steps": (0,)}, ValueError),
        ({"intervall": 3}, TypeError), ({"config": FeatureCacheConfig(), "interval": 3}, TypeError),
        ({"config": 2, "interval": 3}, TypeError),
    ],
)  # fmt: skip
def test_a_bad_option_leaves_the_pipeline_alone(pipe, options, error):
    with pytest.raises(error, match=next(iter(set(options) - {"config"}))):
        apply_feature_cache(pipe, **options)
    assert not hooks(pipe) and not forwards(pipe)


@pytest.mark.parametrize("intervals", [(), (0, 2), (2.0,)])
def test_bad_interval_schedules_are_refused(intervals):
    with pytest.raises(ValueError, match="intervals must be whole numbers"):
        IntervalSchedule(intervals)


def test_what_has_no_unet_of_stable_diffusion_is_refused():
    with pytest.raises(TypeError, match="expected a diffusers pipeline"):
        apply_feature_cache(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="ControlNetModel"):
        apply_feature_cache(make_pipeline("controlnet").controlnet)
    other = make_unet(down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2)
    with pytest.raises(TypeError, match="ResnetDownsampleBlock2D"):
        apply_feature_cache(other)


def test_failing_to_apply_rolls_back(pipe, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("mine")

    monkeypatch.setattr(pipe.unet, "register_forward_hook", fail)
    with pytest.raises(RuntimeError, match="mine"):
        apply_feature_cache(pipe)
    assert not hooks(pipe) and not forwards(pipe)


def test_an_interval_schedule_or_number_is_taken_as_the_interval(pipe):
    schedule = IntervalSchedule((2, 4))
    for interval, options in ((schedule, {}), (2, {"branch": 1})):
        with feature_cache(pipe, interval, **options) as report:
            generate(pipe)
            assert report.cached
    for wrong in ("3", 0, 2.5, [2, 3]):
        with pytest.raises(ValueError, match="interval must be"):
            apply_feature_cache(pipe, wrong)
    with pytest.raises(TypeError, match="either a config or options"):
        apply_feature_cache(pipe, schedule, interval=3)
