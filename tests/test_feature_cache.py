"""The feature cache: which steps are full, what the others skip, and nothing of one picture in the next."""

import copy
import pickle
from collections import Counter

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, attach_execution_device_hook, remove_hook_from_module
from conftest import generate, hooks, make_pipeline, make_unet
from diffusers import DDIMScheduler, EDMEulerScheduler, HeunDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline

from tomesd_plus.caching import (
    FeatureCacheConfig,
    IntervalSchedule,
    apply_feature_cache,
    feature_cache,
    remove_feature_cache,
)

TEXT = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


def noise(seed=0, batch=2, height=16, width=16):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def kinds(report):
    """F for each full call of the latest generation, c for each cached one."""
    return "".join("F" if step.full else "c" for step in report.steps)


def forwards(pipe):
    """Names of the UNet's modules with a forward of their own."""
    return [name for name, module in pipe.unet.named_modules() if "forward" in module.__dict__]


def denoise(unet, timesteps, seed=0, text=TEXT):
    """A loop of the caller's own; yields the latents after each step."""
    sample = noise(seed)
    for timestep in timesteps:
        with torch.no_grad():
            sample = sample - 0.1 * unet(sample, timestep, text).sample
        yield sample


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


def test_removal_is_bit_identical_and_leaves_nothing_behind(any_pipe):
    plain, hooked, names = generate(any_pipe), hooks(any_pipe), list(any_pipe.unet.state_dict())
    report = apply_feature_cache(any_pipe, interval=2, threshold=100.0)
    assert not torch.equal(generate(any_pipe), plain) and report.cached and report.kept_bytes
    assert hooks(any_pipe) != hooked and forwards(any_pipe) and list(any_pipe.unet.state_dict()) == names
    remove_feature_cache(any_pipe)
    assert hooks(any_pipe) == hooked and not forwards(any_pipe)
    assert torch.equal(generate(any_pipe), plain)
    assert report.cached and not report.kept_bytes  # it still tells of what was; what was kept is free


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


def test_applying_twice_is_an_error_and_removing_twice_a_warning(pipe):
    apply_feature_cache(pipe)
    with pytest.raises(ValueError, match="already applied"):
        apply_feature_cache(pipe.unet)
    remove_feature_cache(pipe)
    with pytest.warns(UserWarning, match="no feature cache is applied"):
        remove_feature_cache(pipe)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"interval": 0}, ValueError), ({"interval": 2.5}, ValueError), ({"interval": True}, ValueError),
        ({"branch": -1}, ValueError), ({"branch": 6}, ValueError), ({"full_steps": (0, -1)}, ValueError),
        ({"threshold": 0}, ValueError), ({"threshold": 0.1, "full_steps": (0,)}, ValueError),
        ({"intervall": 3}, TypeError), ({"config": FeatureCacheConfig(), "interval": 3}, TypeError),
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


def test_the_context_manager_restores_after_an_error(pipe):
    plain = generate(pipe)
    with pytest.raises(RuntimeError, match="mine"), feature_cache(pipe, interval=2) as report:
        assert not torch.equal(generate(pipe), plain) and report.cached == 2
        raise RuntimeError("mine")
    assert not hooks(pipe) and not forwards(pipe)
    assert torch.equal(generate(pipe), plain)


# From one generation to the next ------------------------------------------------------------------------------------


def test_the_same_call_gives_the_same_picture_in_any_company(any_pipe):
    report = apply_feature_cache(any_pipe, interval=3)
    first = generate(any_pipe, seed=3)
    assert report.cached
    generate(any_pipe, seed=4, num_inference_steps=3)
    generate(any_pipe, prompt=["a cat", "a dog"])
    if "Img2Img" not in type(any_pipe).__name__ and "ControlNet" not in type(any_pipe).__name__:
        generate(any_pipe, height=48, width=24)
    generate(any_pipe, num_inference_steps=2)
    assert torch.equal(generate(any_pipe, seed=3), first)


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


@pytest.mark.parametrize(
    ("scheduler", "pattern"),
    # Their timesteps are 0 1 1 2 2 3 3 4 4 5 5 and 0 1 1 2 3 4 5.
    [(HeunDiscreteScheduler, "FccFFccFFcc"), (PNDMScheduler, "FccFcFc")],
)
def test_calls_at_one_noise_level_count_once_and_do_the_same(pipe, scheduler, pattern):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    report = apply_feature_cache(pipe, interval=2)
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
        assert all(torch.equal(unet(noise(seed), 500, TEXT).sample, plain[seed]) for seed in range(10))
    assert report.kept_bytes <= 4 * 2 * 16 * 16 * 16 * 4


def test_views_of_a_panorama_do_not_get_each_others_features():
    """As MultiDiffusion calls a UNet: once a view, more often than branches of guidance could be."""
    unet, timesteps = make_unet(), torch.tensor([900, 880, 860])
    with torch.no_grad():
        plain = [unet(noise(view), t, TEXT).sample for t in timesteps for view in range(6)]
        report = apply_feature_cache(unet, interval=2)
        for _ in range(2):  # in a second generation too
            made = [unet(noise(view), t, TEXT).sample for t in timesteps.clone() for view in range(6)]
            assert all(map(torch.equal, made, plain))
    assert "too many calls a step" in str(report)


def test_guidance_switched_off_in_mid_run(pipe):
    def switch_off(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    report = apply_feature_cache(pipe, interval=4)
    options = {"callback_on_step_end": switch_off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    first = generate(pipe, num_inference_steps=8, **options)
    assert kinds(report) == "FcFcccFc" and report.steps[2].reason == "other batch or size"
    assert torch.equal(generate(pipe, num_inference_steps=8, **options), first) and first.isfinite().all()


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


def test_an_exception_in_mid_generation_leaves_no_trace_in_the_next_picture(pipe):
    report = apply_feature_cache(pipe, interval=3)
    first = generate(pipe)

    def stop(pipe, step, timestep, tensors):
        if step == 1:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, seed=1, callback_on_step_end=stop)
    assert kinds(report) == "Fc"
    assert torch.equal(generate(pipe), first)


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


# What else is on the model ------------------------------------------------------------------------------------------


def test_controlnets_act_on_cached_steps_too():
    pipe = make_pipeline("controlnet")
    pictures = []
    for guided_until in (0.2, 1.0):  # the first step alone, or all of them
        with feature_cache(pipe, interval=9) as report:
            pictures.append(generate(pipe, num_inference_steps=5, control_guidance_end=guided_until))
        assert kinds(report) == "Fcccc"
    assert not torch.equal(*pictures)


@pytest.mark.parametrize("branch", range(6))
@pytest.mark.parametrize("threshold", [None, 1e6])
def test_layers_that_write_into_their_input_do_not_spoil_what_is_kept(branch, threshold):
    """FreeU scales its input in place, T2I-Adapters add to it in place."""
    unet = make_unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=2)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    timesteps = torch.tensor([500.0, 499.9999, 499.9998])
    adapter = [noise().repeat(1, 4, 1, 1)[:, :, ::2, ::2], noise(2).repeat(1, 8, 1, 1)[:, :, ::2, ::2]]
    report = apply_feature_cache(unet, interval=9, branch=branch, threshold=threshold)
    with torch.no_grad():
        outputs = [
            unet(noise(), timestep, TEXT, down_intrablock_additional_residuals=[t.clone() for t in adapter]).sample
            for timestep in timesteps
        ]
    assert kinds(report) == "Fcc"
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)  # nothing has changed between them
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_training_mode(checkpointing):
    unet = make_unet().train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    report = apply_feature_cache(unet, interval=3)
    inner, outer = unet.mid_block.resnets[0].conv1.weight, unet.conv_out.weight
    for timestep, full in ((900, True), (800, False)):
        unet.zero_grad()
        unet(noise(), timestep, TEXT).sample.square().mean().backward()
        assert outer.grad.isfinite().all() and (inner.grad is not None) == full
    assert kinds(report) == "Fc"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pipe, dtype):
    pipe.to(dtype)
    report = apply_feature_cache(pipe, interval=2)
    assert generate(pipe).isfinite().all() and kinds(report) == "FcFc"


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_cache_on_their_own(make_copy):
    pipe = make_pipeline("sd")
    plain = generate(pipe)
    apply_feature_cache(pipe, interval=3, threshold=100.0)
    twins = [make_copy(pipe.unet)]  # before any call, in mid-generation, and after

    def copy_too(pipe, step, timestep, tensors):
        if step == 1:
            twins.append(make_copy(pipe.unet))
        return tensors

    first = generate(pipe, callback_on_step_end=copy_too)
    twins.append(make_copy(pipe.unet))
    remove_feature_cache(pipe)
    assert torch.equal(generate(pipe), plain) and not torch.equal(first, plain)
    for twin in twins:
        for parameter in pipe.unet.parameters():
            parameter.data.zero_()  # a copy that runs the original's layers shows
        pipe.unet, old = twin, pipe.unet
        assert torch.equal(generate(pipe), first)
        remove_feature_cache(pipe)
        assert torch.equal(generate(pipe), plain)
        pipe.unet = old


def test_features_are_not_pickled(pipe):
    report = apply_feature_cache(pipe, interval=2, threshold=100.0)
    size = len(pickle.dumps(pipe.unet))
    generate(pipe)
    assert report.kept_bytes > 60_000 and len(pickle.dumps(pipe.unet)) < size + 2000


def test_saving_and_loading_a_caching_pipeline(pipe, tmp_path):
    plain = generate(pipe)
    apply_feature_cache(pipe, interval=2)
    assert not torch.equal(generate(pipe), plain)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded), plain)


def every_module(unet):
    attach_execution_device_hook(unet, "cpu")


def block_by_block(unet):
    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        add_hook_to_module(block, ModelHook())


def layer_by_layer(unet):
    accelerate.cpu_offload(unet, execution_device="cpu")


OFFLOADS = [every_module, block_by_block, layer_by_layer]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload_before_the_cache(pipe, offload):
    plain = generate(pipe)
    with feature_cache(pipe, interval=2):
        cached = generate(pipe)
    offload(pipe.unet)
    report = apply_feature_cache(pipe, interval=2)
    assert torch.equal(generate(pipe), cached) and kinds(report) == "FcFc"
    remove_hook_from_module(pipe.unet, recurse=True)  # takes forwards put on later with it
    assert torch.equal(generate(pipe), cached) and not torch.equal(cached, plain)
    offload(pipe.unet)
    assert torch.equal(generate(pipe), cached)
    remove_feature_cache(pipe)
    assert torch.equal(generate(pipe), plain)
    remove_hook_from_module(pipe.unet, recurse=True)
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("cache_goes_first", [True, False])
def test_offload_after_the_cache(pipe, offload, cache_goes_first):
    plain = generate(pipe)
    report = apply_feature_cache(pipe, interval=2)
    cached = generate(pipe)
    offload(pipe.unet)
    assert torch.equal(generate(pipe), cached) and kinds(report) == "FcFc"
    for last in (False, True):
        if cache_goes_first != last:
            remove_feature_cache(pipe)
        else:
            remove_hook_from_module(pipe.unet, recurse=True)
        assert torch.equal(generate(pipe), plain if cache_goes_first or last else cached)
    own = [type(value) for module in pipe.unet.modules() for value in module.__dict__.values()]
    assert not any(kind.__module__.startswith("tomesd_plus") for kind in own)


def test_another_forward_that_was_there_before_runs_on_full_steps(pipe):
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    hook = Counting()
    add_hook_to_module(pipe.unet.mid_block, hook)
    with feature_cache(pipe, interval=2):
        generate(pipe)
    assert hook.calls == 2
    generate(pipe)
    assert hook.calls == 2 + 4


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("cache_comes_first", [True, False])
def test_the_hosts_model_offload(pipe, cache_comes_first, device):
    with feature_cache(pipe, interval=2):
        expected = generate(pipe)
    if cache_comes_first:
        report = apply_feature_cache(pipe, interval=2)
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_model_cpu_offload(device=device)
        report = apply_feature_cache(pipe, interval=2)
    for _ in range(2):  # the host offloads anew after each call
        torch.testing.assert_close(generate(pipe).cpu(), expected, rtol=0, atol=0 if device == "cpu" else 1e-2)
        assert kinds(report) == "FcFc"


# torch.compile ------------------------------------------------------------------------------------------------------


def compile_unet(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)


def compile_in_place(pipe):
    pipe.unet.compile(backend="eager")


def compile_blocks(pipe):
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("compile_it", [compile_unet, compile_in_place, compile_blocks])
@pytest.mark.parametrize("order", ["cache first", "compile and run first"])
def test_torch_compile(pipe, compile_it, order):
    torch._dynamo.reset()
    plain = generate(pipe)
    with feature_cache(pipe, interval=2):
        cached = generate(pipe)
    if order == "cache first":
        report = apply_feature_cache(pipe, interval=2)
        compile_it(pipe)
    else:
        compile_it(pipe)
        assert torch.equal(generate(pipe), plain)
        report = apply_feature_cache(pipe, interval=2)
    assert torch.equal(generate(pipe), cached) and kinds(report) == "FcFc"
    with torch._dynamo.config.patch(error_on_recompile=True):  # one graph for full steps, one for cached ones
        assert torch.equal(generate(pipe), cached) and kinds(report) == "FcFc"
    remove_feature_cache(pipe)
    assert torch.equal(generate(pipe), plain)


@pytest.mark.slow
def test_torch_compile_of_an_adaptive_cache(pipe):
    torch._dynamo.reset()
    with feature_cache(pipe, interval=9, threshold=0.3) as report:
        cached, pattern = generate(pipe), kinds(report)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    report = apply_feature_cache(pipe, interval=9, threshold=0.3)
    for _ in range(2):
        assert torch.equal(generate(pipe), cached) and kinds(report) == pattern and "c" in pattern
