"""The feature cache's forecast: cached steps that follow the trend of the last two full ones."""

import pytest
import torch
from cache_tools import TEXT, denoise, kinds, noise
from conftest import generate, make_unet
from diffusers import DDIMScheduler, HeunDiscreteScheduler

from tomesd_plus import load_tiny_pipeline
from tomesd_plus.caching import FeatureCacheConfig, apply_feature_cache, feature_cache
from tomesd_plus.evaluation.configurations import Configuration
from tomesd_plus.evaluation.generation import Sampling, compare

SIZE = 2 * 16 * 16 * 16 * 4  # of the feature map at the boundary: batch, channels, height, width, float32


def timesteps(count=9):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(count)
    return scheduler.timesteps


@pytest.fixture
def unet():
    return make_unet()


def watch_boundary(unet, report):
    """The outputs of the last of the skipped layers, computed or forecast, as they come."""
    outputs = []
    boundary = unet.get_submodule(report.skipped_layers[-1])
    boundary.register_forward_hook(lambda *call: outputs.append(_first(call[2]).clone()))
    return outputs


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_cached_steps_follow_the_trend_of_the_last_two_full_ones(unet, share):
    report = apply_feature_cache(unet, full_steps=(0, 2, 5), forecast=share)
    seen = watch_boundary(unet, report)
    list(denoise(unet, timesteps()))
    assert kinds(report) == "FcFccFccc"
    assert torch.equal(seen[1], seen[0])  # no trend yet
    ahead = [0, 0, 0, share / 2, share, 0, share / 3, share * 2 / 3, share]
    assert [step.ahead for step in report.steps] == pytest.approx(ahead)
    assert f" {share / 2:.2f}\n" in str(report)
    expected = {3: seen[2] + share / 2 * (seen[2] - seen[0]), 4: seen[2] + share * (seen[2] - seen[0])}
    expected |= {step: seen[5] + share * (step - 5) / 3 * (seen[5] - seen[2]) for step in (6, 7, 8)}
    for step, features in expected.items():
        torch.testing.assert_close(seen[step], features, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(seen[step], seen[step - 1], atol=1e-4)


def test_a_trend_is_followed_no_further_than_it_is_long(unet):
    report = apply_feature_cache(unet, full_steps=(0, 1), forecast=1)
    seen = watch_boundary(unet, report)
    list(denoise(unet, timesteps(5)))
    for features in seen[2:]:
        torch.testing.assert_close(features, 2 * seen[1] - seen[0], atol=1e-5, rtol=1e-5)


def test_without_a_trend_there_is_nothing_to_follow_and_0_is_reuse(unet):
    apply_feature_cache(unet, interval=5)
    reused = list(denoise(unet, timesteps()))
    for forecast, same_until in ((0, 9), (1, 6)):  # the sixth step is the second full one
        other = make_unet()
        apply_feature_cache(other, interval=5, forecast=forecast)
        same = [torch.equal(*pair) for pair in zip(denoise(other, timesteps()), reused)]
        assert same == [True] * same_until + [False] * (9 - same_until)


def test_two_feature_maps_are_kept_however_long_it_runs(unet):
    report = apply_feature_cache(unet, interval=2, forecast=1)
    kept = [report.kept_bytes for _ in denoise(unet, timesteps())]
    assert kept == [SIZE] * 2 + [2 * SIZE] * 7


def test_calls_at_one_noise_level_make_no_trend(pipe):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)  # its timesteps are 0 1 1 2 2 3 3 4 4 …
    report = apply_feature_cache(pipe, interval=2, forecast=1)
    seen = watch_boundary(pipe.unet, report)
    generate(pipe, num_inference_steps=6)
    assert kinds(report) == "FccFFccFFcc"  # full: step 0, then twice 2, then twice 4
    torch.testing.assert_close(seen[5], seen[4] + (seen[4] - seen[0]) / 2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[9], seen[8] + (seen[8] - seen[4]) / 2, atol=1e-5, rtol=1e-5)


def test_a_full_step_of_another_size_makes_no_trend(unet):
    report = apply_feature_cache(unet, interval=2, forecast=1)
    seen = watch_boundary(unet, report)
    with torch.no_grad():
        for timestep, height in zip(timesteps(), (16, 8, 8, 8, 8)):
            unet(noise(height=height), timestep, TEXT)
    assert kinds(report) == "FFcFc" and torch.equal(seen[2], seen[1])
    torch.testing.assert_close(seen[4], seen[3] + (seen[3] - seen[1]) / 2, atol=1e-5, rtol=1e-5)


def test_a_full_step_that_failed_makes_no_trend(unet):
    report = apply_feature_cache(unet, interval=2, forecast=1)
    seen = watch_boundary(unet, report)
    broken = unet.up_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    first, *others = timesteps(5)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            unet(noise(), first, TEXT)
        broken.remove()
        for timestep in others:
            unet(noise(), timestep, TEXT)
    assert kinds(report) == "FFcFc" and torch.equal(seen[1], seen[0])
    assert [bool(step.ahead) for step in report.steps] == [False] * 4 + [True]


def test_each_guidance_branch_follows_its_own_trend():
    texts, alone = (TEXT, TEXT.flip(0)), []
    options = {"interval": 2, "forecast": 1}
    for text in texts:
        unet = make_unet()
        apply_feature_cache(unet, **options)
        alone.append(list(denoise(unet, timesteps(), text=text)))
    unet = make_unet()
    apply_feature_cache(unet, **options)
    steps = timesteps()  # one tensor: one generation
    together = list(zip(*(denoise(unet, steps, text=text) for text in texts)))
    for one, other in zip(zip(*alone), together, strict=True):
        assert all(map(torch.equal, one, other))


def test_an_adaptive_cache_forecasts_too(unet):
    report = apply_feature_cache(unet, threshold=1e6, interval=3, forecast=0.5)
    list(denoise(unet, timesteps()))
    assert kinds(report) == "FccFccFcc"
    assert [step.ahead for step in report.steps[4:6]] == pytest.approx([1 / 6, 1 / 3])


def test_a_model_moved_to_another_type_in_mid_run_goes_on_without_a_trend(unet):
    report = apply_feature_cache(unet, full_steps=(0, 2), forecast=1)
    with torch.no_grad():
        for index, timestep in enumerate(timesteps(4)):
            with torch.autocast("cpu", torch.bfloat16, enabled=index < 2):
                assert unet(noise(), timestep, TEXT).sample.isfinite().all()
    assert kinds(report) == "FcFc"


def test_compiled_there_are_no_more_graphs(pipe):
    torch.compiler.reset()
    options = {"num_inference_steps": 8}
    report = apply_feature_cache(pipe, interval=2, forecast=1)
    eager = generate(pipe, **options)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    generate(pipe, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(generate(pipe, **options), eager)
    assert kinds(report) == "FcFcFcFc" and report.steps[-1].ahead


@pytest.mark.parametrize("forecast", [-0.1, 1.5, "much", True, float("nan")])
def test_a_share_out_of_range_is_refused(forecast):
    with pytest.raises(ValueError, match="forecast must be a number in"):
        FeatureCacheConfig(forecast=forecast)


def test_the_embedded_pipeline_comes_closer_to_the_untouched_picture():
    pipe = load_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    chosen = [Configuration(f"{share}", {"cache": {"interval": 3, "forecast": share}}) for share in (0, 0.7)]
    result = compare(pipe, ["a large star on a blue background"], chosen, Sampling(18, 3.0))
    reused, forecast = (row.psnr[0] for row in result.rows)
    assert forecast > reused + 1
    with feature_cache(pipe, interval=3, forecast=0.7) as report:
        pipe("a star", num_inference_steps=7, guidance_scale=3.0, output_type="latent")
    assert kinds(report) == "FccFccF"
