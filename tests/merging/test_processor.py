"""``set_attn_processor(ToMeProcessor())`` alone, and each option of the configuration."""

import copy
import gc
import math

import pytest
import torch
from conftest import (
    INPUTS,
    OneLayer,
    attention_layer,
    generate,
    level_of,
    make_pipeline,
    make_unet,
    merge_in,
    plans_of,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.modules import module as torch_module

from tomesd_plus import LinearSchedule, TokenMergingReport, ToMeProcessor, apply_token_merging, token_merging
from tomesd_plus.host.first_call import FirstCalls
from tomesd_plus.merging import processor as processor_module


def report_of(processor):
    return TokenMergingReport({"model": processor.attachment})


def test_one_line_gives_what_apply_gives_from_the_first_step_on(any_pipe):
    ratio = {level_of(any_pipe): LinearSchedule(0.7, 0.2)}
    any_pipe.unet.set_attn_processor(ToMeProcessor(ratio=ratio))
    bare = generate(any_pipe)
    processor = next(iter(any_pipe.unet.attn_processors.values()))
    steps = report_of(processor).steps
    assert len({step.removed[level_of(any_pipe)] for step in steps}) == len(steps) >= 3
    applied = make_pipeline(next(k for k in ("sdxl", "img2img", "controlnet", "sd") if _is(any_pipe, k)))
    apply_token_merging(applied.unet, ratio=ratio)
    assert torch.equal(bare, generate(applied))
    assert torch.equal(bare, generate(any_pipe))


def _is(pipe, kind):
    return {"sdxl": "XL", "img2img": "Img2Img", "controlnet": "ControlNet", "sd": ""}[kind] in type(pipe).__name__


def test_the_default_is_step_aware(pipe):
    processor = ToMeProcessor()
    pipe.unet.set_attn_processor(processor)
    generate(pipe, num_inference_steps=6)
    removed = [step.removed[1] for step in report_of(processor).steps]
    assert removed == sorted(removed, reverse=True) and removed[0] > removed[-1]


@pytest.mark.parametrize("keywords", [False, True])
def test_the_first_call_of_a_unet_merges_however_it_is_called(keywords):
    unet = make_unet()
    processor = ToMeProcessor(ratio=0.5)
    unet.set_attn_processor(processor)

    def call():
        if keywords:
            return unet(**INPUTS, timestep=torch.tensor(700)).sample
        return unet(INPUTS["sample"], 700, INPUTS["encoder_hidden_states"]).sample

    with torch.no_grad():
        first = call()
        assert report_of(processor).removed[1] == 0.5
        assert report_of(processor).steps[0].noise_level == pytest.approx(700 / 999)
        assert torch.equal(call(), first)


def test_nothing_is_left_in_the_process():
    def count():
        return len(torch_module._global_forward_pre_hooks)

    before = count()
    unet = make_unet()
    unet.set_attn_processor(ToMeProcessor(ratio=0.5))
    assert count() == before + 1
    unet(INPUTS["sample"], 700, INPUTS["encoder_hidden_states"])
    assert count() == before
    forgotten = ToMeProcessor()
    del forgotten
    gc.collect()
    torch.nn.Identity()(torch.zeros(1))
    assert count() == before


def test_a_copy_that_has_its_model_keeps_no_hook_in_the_process():
    before = len(torch_module._global_forward_pre_hooks)
    unet = make_unet()
    apply_token_merging(unet, ratio=0.5)
    twin = copy.deepcopy(unet)
    torch.nn.Identity()(torch.zeros(1))
    assert len(torch_module._global_forward_pre_hooks) == before
    assert torch.equal(twin(**INPUTS, timestep=700).sample, unet(**INPUTS, timestep=700).sample)


def test_the_hooks_go_when_the_processor_is_replaced():
    unet = make_unet()
    plain = unet(**INPUTS, timestep=700).sample
    unet.set_attn_processor(ToMeProcessor(ratio=0.5))
    assert not torch.equal(unet(**INPUTS, timestep=700).sample, plain)
    unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(unet(**INPUTS, timestep=700).sample, plain)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in unet.modules())


def test_a_second_processor_takes_over_from_the_first():
    unet = make_unet()
    for ratio in (0.25, 0.5):
        processor = ToMeProcessor(ratio=ratio)
        unet.set_attn_processor(processor)
        unet(**INPUTS, timestep=700)
        assert report_of(processor).removed[1] == ratio


def test_a_processor_without_arguments_for_each_layer_makes_one_plan():
    # as IP-Adapters re-make processors: cls() for every layer
    unet = make_unet()
    unet.set_attn_processor({name: ToMeProcessor() for name in unet.attn_processors})
    unet(**INPUTS, timestep=700)
    assert len({id(processor.attachment) for processor in unet.attn_processors.values()}) == 1


def test_config_and_options_exclude_each_other():
    from tomesd_plus import ToMeConfig

    with pytest.raises(TypeError, match="not both"):
        ToMeProcessor(ToMeConfig(), ratio=0.5)


# Options: each changes the result, and merges ----------------------------------------------------------------------

OPTIONS = [
    {},
    {"cell_size": (2, 4)},
    {"destinations": "fixed"},
    {"metric": "block_input"},
    {"metric": "keys"},
    {"layers": ["self_attention", "cross_attention"]},
    {"layers": ["self_attention", "mlp"]},
    {"layers": ["mlp"]},
    {"layers": ["cross_attention"]},
    {"mode": "prune"},
    {"sides": "keys_values"},
    {"sides": "keys_values", "mode": "prune"},
    {"proportional_attention": False},
    {"proportional_attention": False, "sides": "keys_values"},
    {"plan_per": "block"},
    {"plan_per": "level"},
    {"window": 1},
    {"window": 3},
    {"sides": "queries"},
    {"layers": "block"},
    {"layers": "block", "proportional_attention": False},
    {"seed": 7},
]


@pytest.mark.parametrize("bare", [False, True])
def test_every_option_does_something_of_its_own(bare):
    outputs = []
    for options in OPTIONS:
        unet = make_unet()
        if bare:
            processor = ToMeProcessor(ratio=0.5, **options)
            unet.set_attn_processor(processor)
        else:
            apply_token_merging(unet, ratio=0.5, **options)
            processor = next(p for p in unet.attn_processors.values() if isinstance(p, ToMeProcessor))
        with torch.no_grad():
            output = unet(**INPUTS, timestep=700).sample
            again = unet(**INPUTS, timestep=700).sample
        assert report_of(processor).merged, options
        assert torch.equal(output, again), options
        outputs.append(output)
    for i, one in enumerate(outputs):
        for j in range(i):
            assert not torch.equal(one, outputs[j]), (OPTIONS[i], OPTIONS[j])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("sides", ["both", "keys_values"])
def test_proportional_attention_is_attention_over_the_copied_tokens(heads, sides):
    """Merged keys that weigh by their size give what attention over all N averaged tokens gives."""
    attn, x = attention_layer(heads)
    unet_like = OneLayer(attn)
    attachment = merge_in(unet_like, ratio=40 / 64, sides=sides)
    with torch.no_grad():
        result = unet_like(x)
        plan = next(iter(plans_of(attachment).values()))
        copied = plan.unmerge(plan.merge(x))
        queries = x if sides == "keys_values" else copied
        expected = AttnProcessor2_0()(attn, queries, copied)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        plain = OneLayer(attn)
        merge_in(plain, ratio=40 / 64, sides=sides, proportional_attention=False)
        assert (plain(x) - expected).abs().max() > 1e-3  # without it they differ


def test_identical_tokens_lose_nothing_by_merging():
    """Where every cell holds one value four times over, merging to a quarter is exact up to rounding."""
    attn, _ = attention_layer()
    cells = torch.randn(2, 4, 4, 16)
    x = cells.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).reshape(2, 64, 16)
    model = OneLayer(attn)
    with torch.no_grad():
        expected = model(x)
        attachment = merge_in(model, ratio=0.75)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert attachment.record.value.steps[-1].removed == {1: 0.75}


def test_a_processor_on_two_models_warns():
    processor = ToMeProcessor(ratio=0.5)
    unets = [make_unet(), make_unet()]
    for unet in unets:
        unet.set_attn_processor(processor)
    call = (INPUTS["sample"], 700, INPUTS["encoder_hidden_states"])
    with torch.no_grad():
        unets[0](*call)
        with pytest.warns(UserWarning, match="serves one model only"):
            unets[1](*call)


def test_more_merging_is_further_away():
    pipe = make_pipeline("sd")
    plain = generate(pipe)
    errors = []
    for ratio in (0.1, 0.4, 0.7):
        with token_merging(pipe, ratio=ratio):
            errors.append((generate(pipe) - plain).square().mean().item())
    assert 0 < errors[0] < errors[1] < errors[2] and not math.isnan(errors[2])


def test_processors_that_wait_share_one_hook_and_leave_when_they_have_their_model(pipe, monkeypatch):
    own = processor_module
    waiting = FirstCalls(
        own._carries_unattached, own.attach_to, own._begin_call, own.tell_of_passing_by, processor_module._has_model
    )
    monkeypatch.setattr(processor_module, "_waiting", waiting)  # others wait with another

    def hooks_of_all():
        return list(torch.nn.modules.module._global_forward_pre_hooks.values()).count(waiting)

    held = [ToMeProcessor(ratio=0.5) for _ in range(200)]
    assert hooks_of_all() == 1
    pipe.unet.set_attn_processor(held[0])
    generate(pipe)
    assert held[0].attachment.record.value.steps and hooks_of_all() == 1  # the others still wait
    held.clear()
    gc.collect()
    generate(pipe)
    assert hooks_of_all() == 0
    pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5))
    assert hooks_of_all() == 1
    generate(pipe)
    assert hooks_of_all() == 0


@pytest.mark.parametrize("by_name", [True, False])
def test_a_first_call_that_fails_at_its_door_is_made_up_for(by_name, pipe):
    pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5))
    expected = copy.deepcopy(pipe.unet)
    call = {"sample": INPUTS["sample"], "timestep": 700, "encoder_hidden_states": INPUTS["encoder_hidden_states"]}
    with torch.no_grad():
        expected = expected(**call).sample
        with pytest.raises(RuntimeError):
            wrong = call | {"sample": INPUTS["sample"][:, :3]}  # one channel short
            pipe.unet(**wrong) if by_name else pipe.unet(*wrong.values())
        assert torch.equal(pipe.unet(**call).sample, expected)
