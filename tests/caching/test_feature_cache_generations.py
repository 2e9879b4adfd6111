"""The feature cache from one generation to the next: nothing of one picture in another."""

import copy
from contextlib import nullcontext

import pytest
import torch
from cache_tools import TEXT, denoise, kinds, noise
from conftest import GUIDANCE_SWITCHED_OFF, generate, make_pipeline, make_unet
from diffusers import DDIMScheduler, EDMEulerScheduler, HeunDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline

from tomesd_plus.caching import apply_feature_cache


def test_img2img_with_another_strength_starts_with_a_full_step():
    pipe = make_pipeline("img2img")
    report = apply_feature_cache(pipe, interval=3)
    expected = {}
    for strength in (0.3, 0.5, 0.7, 1.0):
        fresh = make_pipeline("img2img")
        apply_feature_cache(fresh, interval=3)
        expected[strength] = generate(fresh, strength=strength, num_inference_steps=10)
    for strength in (0.7, 0.5, 1.0, 0.3):
        assert torch.equal(generate(pipe, strength=strength, num_inference_steps=10), expected[strength])
        assert kinds(report) == "FccFccFccF"[: round(strength * 10)]


@pytest.mark.parametrize("form", [int, float, lambda t: t, lambda t: t.expand(2), lambda t: torch.tensor([float(t)])])
def test_timesteps_in_any_form_by_position_or_keyword(form):
    unet, scheduler = make_unet(), DDIMScheduler()
    scheduler.set_timesteps(5)
    report = apply_feature_cache(unet, interval=2)
    outputs = []
    for _ in range(2):
        for timestep in scheduler.timesteps:
            with torch.no_grad():
                outputs.append(
                    unet(sample=noise(), timestep=form(timestep), encoder_hidden_states=TEXT, return_dict=False)[0]
                )
        assert kinds(report) == "FcFcF"
    assert all(torch.equal(one, other) for one, other in zip(outputs[:5], outputs[5:]))


@pytest.mark.parametrize("threshold", [None, 1e9])
@pytest.mark.parametrize(
    ("scheduler", "pattern"),
    # Their timesteps are 0 1 1 2 2 3 3 4 4 5 5 and 0 1 1 2 3 4 5.
    [(HeunDiscreteScheduler, "FccFFccFFcc"), (PNDMScheduler, "FccFcFc")],
)
def test_calls_at_one_noise_level_count_once_and_do_the_same(pipe, scheduler, pattern, threshold):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    report = apply_feature_cache(pipe, interval=2, threshold=threshold)
    first = generate(pipe, num_inference_steps=6)
    assert kinds(report) == pattern
    assert torch.equal(generate(pipe, num_inference_steps=6), first) and kinds(report) == pattern


def test_timesteps_below_zero(pipe):
    pipe.scheduler = EDMEulerScheduler()
    report = apply_feature_cache(pipe, interval=3)
    generate(pipe, num_inference_steps=8)
    assert pipe.scheduler.timesteps[5] < 0 and kinds(report) == "FccFccFc"


def test_guidance_branch_by_branch_is_like_each_by_itself():
    """As the host's modular guiders call a UNet: twice for each step, with other texts."""
    scheduler, texts = DDIMScheduler(), (TEXT, TEXT.flip(0))
    scheduler.set_timesteps(6)
    alone = []
    for text in texts:
        unet = make_unet()
        apply_feature_cache(unet, interval=3)
        alone.append(list(denoise(unet, scheduler.timesteps, text=text)))
    unet = make_unet()
    report = apply_feature_cache(unet, interval=3)
    together = list(zip(*(denoise(unet, scheduler.timesteps, text=text) for text in texts)))
    assert kinds(report) == "FFccccFFcccc"
    for one, other in zip(zip(*alone), together):
        assert all(map(torch.equal, one, other))


def test_calls_at_one_timestep_for_ever_are_full_and_keep_little():
    unet = make_unet()
    with torch.no_grad():
        plain = [unet(noise(seed), 500, TEXT).sample for seed in range(10)]
        report = apply_feature_cache(unet, interval=3)
        with pytest.warns(UserWarning, match="a generation of one step has nothing to take from another"):
            made = [unet(noise(seed), 500, TEXT).sample for seed in range(10)]
    assert all(map(torch.equal, made, plain))
    assert report.kept_bytes <= 4 * 2 * 16 * 16 * 16 * 4


def test_views_of_a_panorama_do_not_get_each_others_features():
    """As MultiDiffusion calls a UNet: once a view, more often than branches of guidance could be."""
    unet, timesteps = make_unet(), torch.tensor([900, 880, 860])
    with torch.no_grad():
        plain = [unet(noise(view), t, TEXT).sample for t in timesteps for view in range(6)]
        report = apply_feature_cache(unet, interval=2)
        for second in (False, True):
            with nullcontext() if second else pytest.warns(UserWarning, match="several tiles or views"):
                made = [unet(noise(view), t, TEXT).sample for t in timesteps.clone() for view in range(6)]
            assert all(map(torch.equal, made, plain))
    assert "calls are ambiguous" in str(report)


def test_guidance_switched_off_in_mid_run(pipe):
    report = apply_feature_cache(pipe, interval=4)
    first = generate(pipe, num_inference_steps=8, **GUIDANCE_SWITCHED_OFF)
    assert kinds(report) == "FcFcccFc" and report.steps[2].reason == "other batch or size"
    assert (
        torch.equal(generate(pipe, num_inference_steps=8, **GUIDANCE_SWITCHED_OFF), first) and first.isfinite().all()
    )


@pytest.mark.parametrize("sample", [noise(0, batch=1), noise(0, height=8), noise(0, width=24)])
def test_another_batch_or_size_in_mid_run_is_full(sample):
    unet, scheduler = make_unet(), DDIMScheduler()
    scheduler.set_timesteps(5)
    text = TEXT[: len(sample)]
    with torch.no_grad():
        plain = unet(sample, scheduler.timesteps[1], text).sample
        report = apply_feature_cache(unet, interval=9)
        unet(noise(), scheduler.timesteps[0], TEXT)
        assert torch.equal(unet(sample, scheduler.timesteps[1], text).sample, plain)
        assert unet(sample, scheduler.timesteps[2], text).sample.shape == sample.shape
    assert kinds(report) == "FFc"


def test_sizes_that_are_no_multiple():
    unet = make_unet()
    report = apply_feature_cache(unet, interval=3)
    with torch.no_grad():
        for timestep in (900, 800, 700):
            assert unet(noise(height=13, width=9), timestep, TEXT).sample.shape == (2, 4, 13, 9)
    assert kinds(report) == "Fcc"


def test_an_exception_within_a_call_leaves_nothing_half_kept_and_no_layer_switched_off():
    unet, scheduler = make_unet(), DDIMScheduler()
    scheduler.set_timesteps(6)
    report = apply_feature_cache(unet, interval=3)
    middle = torch.randn(2, 32, 8, 8), torch.randn(2, 64)

    def call(index, broken=None):
        handle = broken.register_forward_pre_hook(lambda *_: 1 / 0) if broken else None
        try:
            unet(noise(), scheduler.timesteps[index], TEXT)
        finally:
            if handle:
                handle.remove()
        return kinds(report)

    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            call(0, broken=unet.up_blocks[0])
        assert call(1) == "FF" and report.steps[1].reason == "nothing kept"
        assert call(2) == "FFc"
        with pytest.raises(ZeroDivisionError):
            call(3, broken=unet.conv_out)
        one, other = (unet.mid_block(middle[0] + i, middle[1], encoder_hidden_states=TEXT) for i in range(2))
        assert not torch.equal(one, other)
        assert call(4) == "FFccF"


def test_two_pipelines_at_once_and_two_that_share_a_unet(pipe):
    apply_feature_cache(pipe, interval=3)
    first = generate(pipe)
    other = make_pipeline("sd")
    apply_feature_cache(other, interval=3)

    def paint_too(pipe, step, timestep, tensors):
        assert torch.equal(generate(other), first)
        return tensors

    assert torch.equal(generate(pipe, callback_on_step_end=paint_too), first)
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(generate(pipe), first) and torch.equal(generate(other), first)
