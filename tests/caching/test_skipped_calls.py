"""Whole calls that are skipped: which, what stands in for their output, on which models, and beside what else."""

import copy
import warnings
from collections import Counter

import accelerate
import pytest
import torch
from accelerate.hooks import attach_execution_device_hook, remove_hook_from_module
from cache_tools import TEXT, compile_blocks, compile_in_place, compile_unet, denoise, forwards, kinds, noise
from conftest import GUIDANCE_SWITCHED_OFF, generate, hooks, make_pipeline, make_unet
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
)

from tomesd_plus import (
    FeatureCacheConfig,
    StepPlan,
    apply_feature_cache,
    apply_token_merging,
    feature_cache,
    generation,
    remove_feature_cache,
)

SLOW = pytest.mark.slow
SKIP_2 = {"interval": 2, "branch": "nothing"}


def timesteps(count=9):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(count)
    return scheduler.timesteps


def outputs_of(unet, count=9, dicts=True):
    """The outputs of a loop's calls on one latent."""
    with torch.no_grad():
        made = [unet(noise(), each, TEXT, return_dict=dicts) for each in timesteps(count)]
    return [each.sample if dicts else each[0] for each in made]


# What runs, and what stands in --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (SKIP_2, "FsFsFsFs"),
        ({"branch": "nothing"}, "FssFssFs"),
        ({"branch": "nothing", "full_steps": [0, 1, 5]}, "FFsssFss"),
        ({"plan": "FSCSFSC"}, "FscsFscF"),  # beyond the plan all steps are full
        ({"plan": "SSSFSCS"}, "FssFscsF"),  # the first is, whatever it says
    ],
)
def test_a_skipped_step_runs_nothing_and_the_report_says_so(any_pipe, options, pattern):
    plain = generate(any_pipe, num_inference_steps=8)
    calls = Counter()
    nets = [each for each in (any_pipe.unet, getattr(any_pipe, "controlnet", None)) if each is not None]
    for index, net in enumerate(nets):
        net.conv_in.register_forward_hook(lambda *_, index=index: calls.update([index]))
    report = apply_feature_cache(any_pipe, **options)
    picture = generate(any_pipe, num_inference_steps=8)
    pattern = pattern[: 6 if "Img2Img" in type(any_pipe).__name__ else 8]
    assert kinds(report) == pattern
    assert set(calls.values()) == {len(pattern.replace("s", ""))} and len(calls) == len(nets)
    assert (report.full, report.cached, report.skipped) == tuple(map(pattern.count, "Fcs"))
    assert f"{report.skipped} skipped" in str(report) and report.kept_bytes
    assert not torch.equal(picture, plain) and (picture - plain).abs().mean() < 0.05
    assert torch.equal(generate(any_pipe, num_inference_steps=8), picture)


@pytest.mark.parametrize("dicts", [True, False])
@pytest.mark.parametrize("order", [None, 1, 2])
def test_outputs_go_on_along_the_last_ones_of_calls_that_ran(order, dicts):
    unet = make_unet()
    plain = outputs_of(unet)
    report = apply_feature_cache(unet, plan="FSSFFSFSS", order=order)
    made = outputs_of(unet, dicts=dicts)
    assert kinds(report) == "FssFFsFss"
    expected = dict(enumerate(plain))
    expected[1] = expected[2] = plain[0]  # no trend yet
    parabola = plain[0] / 6 - 5 / 3 * plain[3] + 5 / 2 * plain[4]  # through 0, 3 and 4, at 5
    expected[5] = parabola if order == 2 else 2 * plain[4] - plain[3]
    near = plain[3] - 3 * plain[4] + 3 * plain[6]  # through 3, 4 and 6, at 7: all at most two apart
    near = plain[3] * (7 - 4) * (7 - 6) / 3 + plain[4] * (7 - 3) * (7 - 6) / -2 + plain[6] * (7 - 3) * (7 - 4) / 6
    expected[7] = 1.5 * plain[6] - 0.5 * plain[4] if order == 1 else near
    far = plain[3] * (8 - 4) * (8 - 6) / 3 + plain[4] * (8 - 3) * (8 - 6) / -2 + plain[6] * (8 - 3) * (8 - 4) / 6
    expected[8] = 2 * plain[6] - plain[4] if order == 1 else far
    for step, output in enumerate(made):
        torch.testing.assert_close(output, expected[step], atol=1e-5, rtol=1e-4)
    if order == 1:
        assert not torch.allclose(made[8], made[7], atol=1e-4)


def test_outputs_of_cached_steps_are_gone_on_from_too():
    unet, other = make_unet(), make_unet()
    apply_feature_cache(other, plan="FCC")
    cached = outputs_of(other, 3)
    report = apply_feature_cache(unet, plan="FCS")
    made = outputs_of(unet, 3)
    assert kinds(report) == "Fcs" and not report.steps[2].full
    torch.testing.assert_close(made[2], 2 * cached[1] - cached[0], atol=1e-5, rtol=1e-4)


def test_three_outputs_are_kept_however_long_it_runs():
    unet = make_unet()
    report = apply_feature_cache(unet, **SKIP_2)
    kept = [report.kept_bytes for _ in denoise(unet, timesteps())]
    one = 2 * 4 * 16 * 16 * 4  # batch, channels, height, width, float32
    assert kept == [one, one, 2 * one, 2 * one, *[3 * one] * 5]
    remove_feature_cache(unet)
    assert not report.kept_bytes


def test_another_form_of_output_is_a_full_step():
    unet = make_unet()
    report = apply_feature_cache(unet, plan="FFSS")
    with torch.no_grad(), pytest.warns(UserWarning, match="cached nothing: what the calls are to return changed"):
        for timestep, dicts in zip(timesteps(4), (True, True, False, True)):
            unet(noise(), timestep, TEXT, return_dict=dicts)
    assert kinds(report) == "FFFF" and report.steps[2].reason == "other form of output"


def test_the_host_may_write_into_what_a_call_gives():
    unet, other = make_unet(), make_unet()
    for model in (unet, other):
        apply_feature_cache(model, **SKIP_2)
    expected = outputs_of(unet)
    with torch.no_grad():
        made = []
        for timestep in timesteps():
            output = other(noise(), timestep, TEXT).sample
            made.append(output.clone())
            output.zero_()
    assert all(map(torch.equal, made, expected))


# From one generation to the next ------------------------------------------------------------------------------------


def test_img2img_with_another_strength():
    pipe = make_pipeline("img2img")
    report = apply_feature_cache(pipe, **SKIP_2)
    expected = {}
    for strength in (0.3, 0.5, 1.0):
        fresh = make_pipeline("img2img")
        apply_feature_cache(fresh, **SKIP_2)
        expected[strength] = generate(fresh, strength=strength, num_inference_steps=10)
    for strength in (0.5, 1.0, 0.3):
        assert torch.equal(generate(pipe, strength=strength, num_inference_steps=10), expected[strength])
        assert kinds(report) == "FsFsFsFsFs"[: round(strength * 10)]


@pytest.mark.parametrize(
    ("scheduler", "options", "pattern"),
    # Their timesteps are 0 1 1 2 2 3 3 4 4 5 5 and 0 1 1 2 3 4 5.
    [
        (HeunDiscreteScheduler, SKIP_2, "FssFFssFFss"),
        (PNDMScheduler, SKIP_2, "FssFsFs"),
        (HeunDiscreteScheduler, {"plan": "FSCFSF"}, "FssccFFssFF"),
        (EDMEulerScheduler, SKIP_2, "FsFsFs"),
    ],
)
def test_calls_at_one_noise_level_do_the_same(pipe, scheduler, options, pattern):
    pipe.scheduler = scheduler() if scheduler is EDMEulerScheduler else scheduler.from_config(pipe.scheduler.config)
    if scheduler is PNDMScheduler:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    report = apply_feature_cache(pipe, **options)
    first = generate(pipe, num_inference_steps=6)
    assert kinds(report) == pattern
    assert torch.equal(generate(pipe, num_inference_steps=6), first) and kinds(report) == pattern


@pytest.mark.parametrize("kind", ["sd", "img2img"])
def test_guidance_switched_off_in_mid_run(kind):
    pipe = make_pipeline(kind)
    report = apply_feature_cache(pipe, interval=4, branch="nothing")
    first = generate(pipe, num_inference_steps=8, **GUIDANCE_SWITCHED_OFF)
    assert kinds(report) == "FsFsssFs"[: len(report.steps)]
    assert report.steps[2].reason == "other batch or size" and first.isfinite().all()
    assert torch.equal(generate(pipe, num_inference_steps=8, **GUIDANCE_SWITCHED_OFF), first)


def test_guidance_branch_by_branch_is_like_each_by_itself():
    texts, alone = (TEXT, TEXT.flip(0)), []
    for text in texts:
        unet = make_unet()
        apply_feature_cache(unet, **SKIP_2)
        alone.append(list(denoise(unet, timesteps(), text=text)))
    unet, steps = make_unet(), timesteps()
    report = apply_feature_cache(unet, **SKIP_2)
    together = list(zip(*(denoise(unet, steps, text=text) for text in texts)))
    assert kinds(report) == "FFss" * 4 + "FF"
    for one, other in zip(zip(*alone), together, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("sample", [noise(0, batch=1), noise(0, height=8), noise(0, width=24)])
def test_another_batch_or_size_in_mid_run_is_full(sample):
    unet, steps = make_unet(), timesteps(5)
    with torch.no_grad():
        plain = unet(sample, steps[1], TEXT[: len(sample)]).sample
        report = apply_feature_cache(unet, interval=9, branch="nothing")
        unet(noise(), steps[0], TEXT)
        assert torch.equal(unet(sample, steps[1], TEXT[: len(sample)]).sample, plain)
        assert torch.equal(unet(sample, steps[2], TEXT[: len(sample)]).sample, plain)  # one is nothing to go on from
    assert kinds(report) == "FFs"


def test_an_exception_within_a_call_leaves_nothing_half_kept():
    unet, steps = make_unet(), timesteps(6)
    report = apply_feature_cache(unet, **SKIP_2)
    broken = unet.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            unet(noise(), steps[0], TEXT)
        broken.remove()
        for each in steps[1:4]:
            unet(noise(), each, TEXT)
    assert kinds(report) == "FFsF" and report.steps[1].reason == "nothing kept"


@torch.no_grad()
def test_generations_by_hand_and_rising_timesteps():
    unet = make_unet()
    report = apply_feature_cache(unet, **SKIP_2)
    with generation(unet):
        for timestep in (100, 300, 500, 700):
            unet(noise(), timestep, TEXT)
    assert kinds(report) == "FsFs"


def test_a_plan_with_noise_levels_is_carried_over(pipe):
    levels = tuple(each / 999 for each in range(876, 0, -125))
    report = apply_feature_cache(pipe, plan=StepPlan("FSSFSSFC", levels))
    for steps, pattern in ((8, "FssFssFc"), (16, "FssFssFFssFssFcc"), (4, "FFsF")):
        generate(pipe, num_inference_steps=steps)
        assert kinds(report) == pattern


def test_image_to_image_has_the_letters_of_its_noise_levels():
    pipe = make_pipeline("img2img")
    levels = tuple(each / 999 for each in range(901, 0, -100))
    report = apply_feature_cache(pipe, plan=StepPlan("FSSSSSFSSF", levels))
    generate(pipe, num_inference_steps=10, strength=0.5)
    assert kinds(report) == "FFssF"


# Models ------------------------------------------------------------------------------------------------------------


def _sd3():
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    parts = dict.fromkeys([f"{part}{n}" for n in ("", "_2", "_3") for part in ("text_encoder", "tokenizer")])
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = StableDiffusion3Pipeline(transformer=model, scheduler=scheduler, vae=_vae(4), **parts)
    embeds = {name: torch.randn(1, 5, 8) for name in ("prompt_embeds", "negative_prompt_embeds")}
    pooled = {name: torch.randn(1, 8) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    return pipe, embeds | pooled | {"height": 16, "width": 16}


def _pixart():
    model = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=2, in_channels=4,
        cross_attention_dim=8, caption_channels=8, out_channels=8, norm_num_groups=1, use_additional_conditions=False,
    )  # fmt: skip
    parts = {"text_encoder": None, "tokenizer": None, "vae": _vae(4), "scheduler": DDIMScheduler(clip_sample=False)}
    embeds = {name: torch.randn(1, 5, 8) for name in ("prompt_embeds", "negative_prompt_embeds")}
    masks = {name.replace("embeds", "attention_mask"): torch.ones(1, 5) for name in embeds}
    options = {"negative_prompt": None, "height": 16, "width": 16, "use_resolution_binning": False}
    return PixArtAlphaPipeline(transformer=model, **parts), embeds | masks | options


def _flux():
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    parts = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipe = FluxPipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(4), **parts)
    return pipe, {"prompt_embeds": torch.randn(1, 5, 8), "pooled_prompt_embeds": torch.randn(1, 8), "height": 16,
                  "width": 16}  # fmt: skip


def _unconditional():
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    return DDIMPipeline(unet=unet, scheduler=DDIMScheduler()), {}


def _vae(channels):
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=16, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, shift_factor=0.1, scaling_factor=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("make", [_sd3, _pixart, _flux, _unconditional])
def test_any_denoiser(make):
    torch.manual_seed(0)
    pipe, options = make()
    pipe.set_progress_bar_config(disable=True)
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    call = options | {"num_inference_steps": 6, "output_type": "np"}

    def picture():
        return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(0)).images)

    plain, calls = picture(), []
    layer = next(each for each in model.children() if list(each.parameters()))
    layer.register_forward_hook(lambda *_: calls.append(1))
    report = apply_feature_cache(pipe, plan="FFSSFS")
    first = picture()
    assert kinds(report) == "FFssFs" and len(calls) % 3 == 0 and not torch.equal(first, plain)
    assert torch.equal(picture(), first) and kinds(report) == "FFssFs"
    remove_feature_cache(pipe)
    assert torch.equal(picture(), plain) and "forward" not in vars(model)
    for options in ({"interval": 2}, {"plan": "FCFC"}):
        with pytest.raises(TypeError, match=r"skip whole calls.*branch=.nothing"):
            apply_feature_cache(pipe, **options)


@torch.no_grad()
def test_a_scope_around_a_transformers_calls():
    model = _sd3()[0].transformer
    report = apply_feature_cache(model, **SKIP_2)
    inputs = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8), torch.randn(1, 8)
    with generation(model):
        for timestep in (100.0, 300.0, 500.0):
            model(*inputs, torch.tensor([timestep]))
    assert kinds(report) == "FsF"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"plan": ""}, "letters F, C and S"), ({"plan": "FXS"}, "letters F, C and S"), ({"plan": 3}, "letters"),
        ({"plan": "F" * 1001}, "1000 steps at most"), ({"plan": "FSF", "interval": 2}, "plan or interval"),
        ({"plan": "FSF", "full_steps": [0]}, "plan or full_steps"), ({"plan": "FCF", "branch": "nothing"}, "use S"),
        ({"branch": "nothing", "threshold": 0.1}, "threshold"), ({"plan": "FSF", "threshold": 0.1}, "threshold"),
        ({"order": 0, **SKIP_2}, "order must be"), ({"order": 3}, "order must be"), ({"order": True}, "order must be"),
        ({"branch": "none"}, "branch must be"),
    ],
)  # fmt: skip
def test_a_bad_plan_is_refused(pipe, options, match):
    with pytest.raises(ValueError, match=match):
        apply_feature_cache(pipe, **options)
    assert not hooks(pipe) and not forwards(pipe)


@pytest.mark.parametrize("levels", [(0.9,), (0.9, 0.9), (0.5, 0.9), (2.0, 0.5), (float("nan"), 0.1), ("1", "0")])
def test_bad_noise_levels_are_refused(levels):
    with pytest.raises(ValueError, match="noise levels"):
        StepPlan("FS", levels)


def test_what_denoises_nothing_is_refused():
    config = FeatureCacheConfig(**SKIP_2)
    for other in (make_pipeline("sd").vae, make_pipeline("controlnet").controlnet, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="expected a diffusers pipeline"):
            apply_feature_cache(other, config)


# What else is on the model ------------------------------------------------------------------------------------------


def test_controlnets_run_where_they_are_needed():
    pipe = make_pipeline("controlnet")
    calls = []
    pipe.controlnet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    pictures = []
    for target, options, count in ((pipe, {}, 3), (pipe.unet, {}, 6), (pipe, {"guess_mode": True}, 6)):
        calls.clear()
        with feature_cache(target, **SKIP_2) as report:
            pictures.append(generate(pipe, num_inference_steps=6, **options))
            assert kinds(report) == "FsFsFs" and len(calls) == count
    assert torch.equal(*pictures[:2])  # skipped or not, nobody looks at what it gives
    assert not torch.equal(*pictures[1:]) and not hooks(pipe.controlnet) and "forward" not in vars(pipe.controlnet)


def test_a_controlnets_skipped_call_that_is_needed_after_all_is_an_error():
    pipe = make_pipeline("controlnet")
    apply_feature_cache(pipe, plan="FFSS")
    unet, steps, image = pipe.unet, timesteps(4), torch.rand(2, 3, 32, 32)
    with torch.no_grad(), pytest.raises(RuntimeError, match="so its ControlNet was"):
        for index, timestep in enumerate(steps):
            pipe.controlnet(noise(), timestep, TEXT, image)
            unet(noise(batch=1 if index == 2 else 2), timestep, TEXT[: 1 if index == 2 else 2])


def test_two_pipelines_share_a_controlnet():
    pipes = [make_pipeline("controlnet") for _ in range(2)]
    alone = []
    for pipe, options in zip(pipes, (SKIP_2, {"plan": "FFSS"})):
        apply_feature_cache(pipe, **options)
        alone.append(generate(pipe))
    remove_feature_cache(pipes[1])
    pipes[1].controlnet = pipes[0].controlnet
    apply_feature_cache(pipes[1], plan="FFSS")
    for _ in range(2):
        for pipe, expected in zip(pipes, alone):
            assert torch.equal(generate(pipe), expected)
    other = copy.deepcopy(pipes[0])
    remove_feature_cache(pipes[0])
    assert torch.equal(generate(pipes[1]), alone[1]) and torch.equal(generate(other), alone[0])
    remove_feature_cache(pipes[1])
    generate(pipes[1])
    assert not hooks(pipes[1])


def test_merging_beside_skipped_steps(pipe):
    report = apply_token_merging(pipe, ratio=0.5, full_steps="cache", plan_every="cache")
    cached = apply_feature_cache(pipe, plan="FCSCFSC")
    first = generate(pipe, num_inference_steps=7)
    assert kinds(cached) == "FcscFsc"
    assert [bool(step.removed) for step in report.steps] == [kind == "c" for kind in kinds(cached)]
    assert torch.equal(generate(pipe, num_inference_steps=7), first)


@pytest.mark.parametrize(
    "options",
    [
        {"full_steps": "cache"},
        {"plan_every": "cache"},
        {"cached_ratio": 0.7},
        {"full_steps": "cache", "cached_ratio": 0},
    ],
)
@pytest.mark.parametrize("merging_first", [True, False])
def test_options_of_cached_steps_beside_a_cache_without_any_say_so_once(pipe, options, merging_first):
    if merging_first:
        apply_token_merging(pipe, ratio=0.5, **options)
    apply_feature_cache(pipe, plan="FFSF")
    if not merging_first:
        apply_token_merging(pipe, ratio=0.5, **options)
    with pytest.warns(UserWarning, match="does not follow the feature cache") as told:
        generate(pipe)
        generate(pipe)
    assert len(told) == 1 and all(name in str(told[0].message) for name in options)
    remove_feature_cache(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_feature_cache(pipe, plan="FFSC")
        generate(pipe)


def every_module(unet):
    attach_execution_device_hook(unet, "cpu")


def layer_by_layer(unet):
    accelerate.cpu_offload(unet, execution_device="cpu")


@pytest.mark.parametrize("offload", [every_module, layer_by_layer])
@pytest.mark.parametrize("cache_comes_first", [True, False])
def test_offload(pipe, offload, cache_comes_first):
    plain = generate(pipe)
    with feature_cache(pipe, plan="FFSC"):
        expected = generate(pipe)
    if not cache_comes_first:
        offload(pipe.unet)
    report = apply_feature_cache(pipe, plan="FFSC")
    if cache_comes_first:
        offload(pipe.unet)
    assert torch.equal(generate(pipe), expected) and kinds(report) == "FFsc"
    remove_hook_from_module(pipe.unet, recurse=True)  # may take ours with it
    assert torch.equal(generate(pipe), expected) and kinds(report) == "FFsc"
    remove_feature_cache(pipe)
    assert torch.equal(generate(pipe), plain)
    own = [type(value) for module in pipe.unet.modules() for value in module.__dict__.values()]
    assert not any(kind.__module__.startswith("tomesd_plus") for kind in own)


def test_the_hosts_model_offload():
    pipe = make_pipeline("controlnet")
    with feature_cache(pipe, **SKIP_2):
        expected = generate(pipe)
    report = apply_feature_cache(pipe, **SKIP_2)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the host offloads anew after each call
        assert torch.equal(generate(pipe), expected) and kinds(report) == "FsFs"


@pytest.mark.parametrize(
    "compile_it", [compile_unet, pytest.param(compile_in_place, marks=SLOW), pytest.param(compile_blocks, marks=SLOW)]
)
@pytest.mark.parametrize("order", ["cache first", "compile and run first"])
def test_torch_compile(pipe, compile_it, order):
    torch._dynamo.reset()
    plain = generate(pipe)
    with feature_cache(pipe, plan="FFSC"):
        expected = generate(pipe)
    if order == "cache first":
        report = apply_feature_cache(pipe, plan="FFSC")
        compile_it(pipe)
    else:
        compile_it(pipe)
        assert torch.equal(generate(pipe), plain)
        report = apply_feature_cache(pipe, plan="FFSC")
    for _ in range(2):
        assert torch.equal(generate(pipe), expected) and kinds(report) == "FFsc"
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(generate(pipe), expected) and kinds(report) == "FFsc"
    remove_feature_cache(pipe)
    assert torch.equal(generate(pipe), plain)
