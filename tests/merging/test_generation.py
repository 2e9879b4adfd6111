"""What belongs to a generation: found by its thread, in gradient checkpointing by its call, and in compiled layers."""

import copy
import threading

import pytest
import torch
from conftest import INPUTS, make_unet
from torch.utils._python_dispatch import TorchDispatchMode

from tomesd_plus import CosineSchedule, apply_feature_cache, apply_token_merging

OPTIONS = [
    {"ratio": 0.5},
    {"ratio": 0.5, "layers": "block", "plan_every": 2},
    {"layers": ["self_attention", "mlp"], "full_steps": 2, "plan_per": "block"},
]


def in_a_thread(run):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("where", ["the same thread", "another"])
def test_checkpointed_blocks_are_run_again_as_they_ran_at_first(options, where):
    """Two calls at unlike steps, and only then gradients, in reverse; autograd on CUDA has a thread of its own."""
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        report = apply_token_merging(unet, **options)
        text = INPUTS["encoder_hidden_states"]
        losses = [unet(INPUTS["sample"], t, text).sample.square().mean() for t in torch.tensor([900, 500, 100])]
        assert report.merged
        for loss in reversed(losses):
            in_a_thread(loss.backward) if where == "another" else loss.backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_reentrant_checkpointing_finds_the_latest_call(checkpointing):
    unet = make_unet().train()
    apply_token_merging(unet, ratio=0.5)
    if checkpointing:
        checkpoint = torch.utils.checkpoint.checkpoint
        unet.enable_gradient_checkpointing(lambda module, *args: checkpoint(module, *args, use_reentrant=True))
    sample = INPUTS["sample"].clone().requires_grad_()
    loss = unet(sample, 900, INPUTS["encoder_hidden_states"]).sample.square().mean()
    in_a_thread(loss.backward)
    plain = make_unet().train()
    apply_token_merging(plain, ratio=0.5)
    plain(INPUTS["sample"], 900, INPUTS["encoder_hidden_states"]).sample.square().mean().backward()
    for one, other in zip(unet.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.5},
        {"ratio": 0.5, "layers": "block"},
        {"layers": ["self_attention", "mlp"], "full_steps": 2},
        {"cached_ratio": 0.25, "full_steps": "cache"},
    ],
)
def test_compiled_layers_in_two_threads(options):
    torch.compiler.reset()
    timesteps = {0: torch.tensor([900, 700, 500, 300]), 1: torch.tensor([999, 600, 200, 100])}
    samples = {0: INPUTS["sample"], 1: INPUTS["sample"].flip(-1)}
    plain = make_unet()

    def outputs(unet, index):
        with torch.no_grad():
            return [unet(samples[index], t, INPUTS["encoder_hidden_states"]).sample for t in timesteps[index].clone()]

    def merged(unet):
        apply_token_merging(unet, plan_per="block", **options)
        if options.get("full_steps") == "cache":
            apply_feature_cache(unet, interval=2)
        return unet

    expected = [outputs(merged(copy.deepcopy(plain)), index) for index in range(2)]
    compiled = merged(plain)
    compiled.compile_repeated_blocks(fullgraph=True, backend="eager")
    made = {}
    outputs(compiled, 0)
    threads = [
        threading.Thread(target=lambda index=index: made.update({index: [outputs(compiled, index) for _ in range(3)]}))
        for index in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        for output in made[index]:
            for one, other in zip(output, expected[index], strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_gradients_in_training_mode():
    unet = make_unet().train()
    report = apply_token_merging(unet, ratio=0.5, layers=["self_attention", "mlp"])
    unet(torch.randn(2, 4, 16, 16), 500, torch.randn(2, 7, 16)).sample.square().mean().backward()
    assert report.merged
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def test_gradient_checkpointing_runs_the_same_plans_again():
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet().train()
        report = apply_token_merging(unet, ratio=0.5, layers=["self_attention", "mlp"])
        if checkpointing:
            unet.enable_gradient_checkpointing()
        sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        text = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
        unet(sample, 500, text).sample.square().mean().backward()
        assert report.merged
        gradients.append([p.grad for p in unet.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "keys", "layers": ["self_attention", "mlp"]},
        {"layers": "block"},
        {"full_steps": 2},
        {"window": None},
    ],
)
def test_only_a_generations_first_step_reads_from_the_device(options):
    """What would make the host wait for a GPU: a number's value, or how many entries are not zero."""
    unet = make_unet()
    report = apply_token_merging(unet, ratio=CosineSchedule(0.6, 0.3), **options)
    timesteps = torch.tensor([900, 700, 500, 300])
    with torch.no_grad():
        unet(**INPUTS, timestep=timesteps[0])
        with NoReading():
            for timestep in timesteps[1:]:
                unet(**INPUTS, timestep=timestep)
        assert report.merged
        with pytest.raises(AssertionError), NoReading():
            timesteps[1].item()


class NoReading(TorchDispatchMode):
    """Fails where a value is read from a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return function(*args, **(kwargs or {}))
