"""The feature cache beside what else is on a model: offloading, copies, half precision, torch.compile."""

import pickle

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, attach_execution_device_hook, remove_hook_from_module
from cache_tools import TEXT, compile_blocks, compile_in_place, compile_unet, kinds, noise
from conftest import generate, make_pipeline, make_unet

from tomesd_plus.caching import (
    apply_feature_cache,
    feature_cache,
    remove_feature_cache,
)

SLOW = pytest.mark.slow
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


# What else is on the model ------------------------------------------------------------------------------------------


@pytest.fixture
def no_numbers(monkeypatch):
    """What nobody has written is not a number."""
    unpatched = torch.Tensor.new_empty

    def filled(tensor, *args, **options):
        made = unpatched(tensor, *args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@pytest.mark.usefixtures("no_numbers")
def test_controlnets_act_on_cached_steps_too():
    pipe = make_pipeline("controlnet")
    pictures = []
    for guided_until in (0.2, 1.0):  # the first step alone, or all of them
        with feature_cache(pipe, interval=9) as report:
            pictures.append(generate(pipe, num_inference_steps=5, control_guidance_end=guided_until))
        assert kinds(report) == "Fcccc"
    assert not torch.equal(*pictures) and all(picture.isfinite().all() for picture in pictures)


@pytest.mark.parametrize("branch", range(6))
@pytest.mark.parametrize("threshold", [None, 1e6])
def test_layers_that_write_into_their_input_do_not_spoil_what_is_kept(branch, threshold, no_numbers):
    """FreeU scales its input in place, T2I-Adapters add to it in place; what skipped layers give goes nowhere."""
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


def test_features_are_not_pickled(pipe):
    report = apply_feature_cache(pipe, interval=2, threshold=100.0)
    size = len(pickle.dumps(pipe.unet))
    generate(pipe)
    assert report.kept_bytes > 60_000 and len(pickle.dumps(pipe.unet)) < size + 2000


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


@pytest.mark.parametrize(
    "compile_it",
    [pytest.param(compile_unet, marks=SLOW), pytest.param(compile_in_place, marks=SLOW), compile_blocks],
)
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


def test_torch_compile_of_an_adaptive_cache(pipe):
    torch._dynamo.reset()
    with feature_cache(pipe, interval=9, threshold=0.3) as report:
        cached, pattern = generate(pipe), kinds(report)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    report = apply_feature_cache(pipe, interval=9, threshold=0.3)
    for _ in range(2):
        assert torch.equal(generate(pipe), cached) and kinds(report) == pattern and "c" in pattern
