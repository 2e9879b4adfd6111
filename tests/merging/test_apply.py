"""Applying, removing and reporting, on every kind of pipeline."""

import warnings

import accelerate
import pytest
import torch
from conftest import GUIDANCE_SWITCHED_OFF, generate, hooks, level_of, make_pipeline, make_unet
from diffusers import EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, PNDMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from tomesd_plus import (
    LinearSchedule,
    StepsSchedule,
    ToMeConfig,
    ToMeProcessor,
    apply_token_merging,
    remove_token_merging,
    token_merging,
)


def test_merging_changes_the_picture_and_the_report_says_by_how_much(any_pipe):
    plain = generate(any_pipe)
    level = level_of(any_pipe)
    report = apply_token_merging(any_pipe, ratio={level: 0.5})
    assert "has not run yet" in str(report)
    merged = generate(any_pipe)
    assert report.merged and report.removed[level] == pytest.approx(0.5, abs=0.01)
    assert len(report.steps) == len({step.noise_level for step in report.steps}) >= 3
    assert all(step.removed[level] == pytest.approx(0.5, abs=0.01) for step in report.steps)
    assert not torch.equal(merged, plain)
    assert (merged - plain).abs().mean() < 0.05
    assert "50.0%" in str(report)


def test_ratio_zero_is_bit_identical(any_pipe):
    plain = generate(any_pipe)
    report = apply_token_merging(any_pipe, ratio={level_of(any_pipe): 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(generate(any_pipe), plain)
    assert not report.merged and any(
        str(layer.reason) == "the ratio is 0 at this noise level" for layer in report.layers
    )


def test_the_seed_of_the_destinations_matters_and_fixed_ones_have_none(pipe):
    pictures = []
    for options in (
        {"seed": 0},
        {"seed": 1},
        {"destinations": "fixed", "seed": 0},
        {"destinations": "fixed", "seed": 1},
    ):
        with token_merging(pipe, ratio=0.5, **options) as report:
            pictures.append(generate(pipe))
            assert report.merged
    assert not torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[2], pictures[3])


def test_a_bad_option_leaves_the_pipeline_alone(pipe):
    before = pipe.unet.attn_processors
    with pytest.raises(ValueError):
        apply_token_merging(pipe, ratio=1.5)
    with pytest.raises(TypeError):
        apply_token_merging(pipe, ToMeConfig(), ratio=0.2)
    with pytest.raises(TypeError):
        apply_token_merging(pipe, rato=0.2)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())
    assert not hooks(pipe)


@pytest.mark.parametrize("thing", [None, "runwayml/stable-diffusion-v1-5", torch.nn.Linear(2, 2)])
def test_what_is_no_pipeline_is_refused(thing):
    with pytest.raises(TypeError, match="expected a diffusers pipeline"):
        apply_token_merging(thing)


def test_a_unet_alone_and_its_other_processors(pipe):
    pipe.unet.set_attn_processor(AttnProcessor())
    plain = generate(pipe)
    report = apply_token_merging(pipe.unet, 0.5)
    inner = {type(processor.inner) for processor in pipe.unet.attn_processors.values() if hasattr(processor, "inner")}
    assert inner == {AttnProcessor}
    assert not torch.equal(generate(pipe), plain) and report.merged
    remove_token_merging(pipe.unet)
    assert torch.equal(generate(pipe), plain)


def test_sdxl_with_max_downsample_1_warns_once_and_says_what_to_set():
    pipe = make_pipeline("sdxl")
    plain = generate(pipe)
    with token_merging(pipe, ratio=0.5) as report, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(generate(pipe), plain)
        generate(pipe)
    words = [str(w.message) for w in caught if "merged nothing" in str(w.message)]
    assert len(words) == 1 and "max_downsample=2" in words[0]
    assert not report.merged and {str(layer.reason) for layer in report.layers} == {
        "level 2 is not merged by the configuration"
    }
    with token_merging(pipe, ratio=0.5, max_downsample=2) as report:
        assert not torch.equal(generate(pipe), plain) and report.removed == {2: 0.5}


def test_cells_that_do_not_fit_warn(pipe):
    with token_merging(pipe, ratio=0.5, cell_size=(20, 20)) as report, pytest.warns(UserWarning, match="no cell fits"):
        generate(pipe)
    assert not report.merged


@pytest.mark.parametrize(
    "scheduler", [EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, PNDMScheduler]
)
def test_the_ratio_follows_the_noise_level_under_any_scheduler(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    schedule = LinearSchedule(0.7, 0.1)
    report = apply_token_merging(pipe, ratio=schedule)
    generate(pipe, num_inference_steps=6)
    assert len(report.steps) == len(pipe.scheduler.timesteps)
    for step in report.steps:
        assert step.removed[1] == int(256 * schedule(step.noise_level)) / 256
    assert len({step.removed[1] for step in report.steps}) >= 5


def test_img2img_starts_in_the_middle_of_the_schedule():
    pipe = make_pipeline("img2img")
    report = apply_token_merging(pipe, ratio=StepsSchedule((0.6, 0.2)))
    generate(pipe, strength=0.4, num_inference_steps=10)
    assert {step.removed[1] for step in report.steps} == {int(256 * 0.2) / 256}


def test_levels_have_their_own_ratios(pipe):
    report = apply_token_merging(pipe, ratio={1: 0.5, 2: 0.25})
    generate(pipe)
    assert report.removed == {1: 0.5, 2: 0.25}


def test_controlnets_are_covered_and_named():
    pipe = make_pipeline("controlnet")
    report = apply_token_merging(pipe, ratio=0.5)
    generate(pipe)
    removed = {layer.name.split(".")[0] for layer in report.layers if layer.removed}
    assert removed == {"unet", "controlnet"}
    remove_token_merging(pipe)
    assert not any(isinstance(p, ToMeProcessor) for p in pipe.controlnet.attn_processors.values())


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("prompts", [1, 3])
def test_odd_batches_and_no_guidance(pipe, guidance_scale, prompts):
    report = apply_token_merging(pipe, ratio=0.5)
    pictures = generate(pipe, prompt=["a cat"] * prompts, guidance_scale=guidance_scale)
    assert pictures.shape[0] == prompts and pictures.isfinite().all() and report.removed[1] == 0.5


def test_guidance_switched_off_in_mid_run(pipe):
    report = apply_token_merging(pipe, ratio=0.5)
    assert torch.equal(generate(pipe, **GUIDANCE_SWITCHED_OFF), generate(pipe, **GUIDANCE_SWITCHED_OFF))
    assert report.removed[1] == 0.5


@pytest.mark.parametrize(("height", "width"), [(16, 12), (13, 9), (17, 16), (4, 30), (1, 1)])
def test_any_latent_size(height, width):
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, max_downsample=2)
    sample = torch.randn(2, 4, height, width)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the 1 × 1 latents, in which no cell fits
        output = unet(sample, 500, torch.randn(2, 7, 16)).sample
        removed = report.removed
    assert output.shape == sample.shape and output.isfinite().all()
    assert removed.get(1, 0) == int(height * width * 0.5) / (height * width) * (height * width > 1)


def test_default_processor_is_the_hosts(pipe):
    apply_token_merging(pipe)
    assert {type(p.inner) for p in pipe.unet.attn_processors.values() if isinstance(p, ToMeProcessor)} == {
        AttnProcessor2_0
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pipe, dtype):
    pipe.to(dtype)
    report = apply_token_merging(pipe, ratio=0.5)
    assert generate(pipe).isfinite().all() and report.merged


@pytest.mark.parametrize("merging_comes_first", [True, False])
def test_the_hosts_offloading(pipe, merging_comes_first):
    with token_merging(pipe, ratio=0.5, layers=["self_attention", "mlp"], full_steps=3):
        expected = generate(pipe)
    if merging_comes_first:
        report = apply_token_merging(pipe, ratio=0.5, layers=["self_attention", "mlp"], full_steps=3)
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        accelerate.cpu_offload(pipe.unet, execution_device="cpu")  # as sequential offloading does
        report = apply_token_merging(pipe, ratio=0.5, layers=["self_attention", "mlp"], full_steps=3)
    for _ in range(2):  # the host offloads anew after each call
        assert torch.equal(generate(pipe), expected) and report.merged
