"""Processors of other signatures, and add-ons that bring their own."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from conftest import INPUTS, generate, hooks, level_of, make_pipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

from tomesd_plus import (
    ToMeProcessor,
    apply_preset,
    apply_token_merging,
    generation,
    merging_report,
    remove_token_merging,
    tomesd,
)

SWITCHES = {
    "merging": lambda pipe, ratio: apply_token_merging(pipe, ratio=ratio, max_downsample=level_of(pipe)),
    "whole blocks": lambda pipe, ratio: apply_token_merging(
        pipe, ratio=ratio, layers="block", max_downsample=level_of(pipe)
    ),
    "drop-in": lambda pipe, ratio: tomesd.apply_patch(pipe, ratio=ratio, max_downsample=level_of(pipe)),
}


class Plain:
    """A processor that takes what diffusers passes by name, and no more."""

    permutation_equivariant = True

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize(
    "processor", [SlicedAttnProcessor(1), AttnProcessor(), Plain()], ids=lambda p: type(p).__name__
)
def test_processors_of_other_signatures_are_called_as_diffusers_calls_them(kind, switch, processor):
    pipe = make_pipeline(kind)
    pipe.unet.set_attn_processor(processor)
    plain = generate(pipe)
    SWITCHES[switch](pipe, 0.0)
    assert torch.equal(generate(pipe), plain)
    remove_token_merging(pipe)
    SWITCHES[switch](pipe, 0.5)
    merged = generate(pipe)
    assert not torch.equal(merged, plain)
    remove_token_merging(pipe)
    assert torch.equal(generate(pipe), plain)
    if switch != "drop-in":  # which draws anew
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        SWITCHES[switch](pipe, 0.5)
        torch.testing.assert_close(generate(pipe), merged, atol=2e-3, rtol=0)  # by another kernel


def test_a_preset_on_a_sliced_pipeline(pipe):
    pipe.enable_attention_slicing()
    plain = generate(pipe)
    report = apply_preset(pipe, "fast", force=True)
    assert not torch.equal(generate(pipe), plain) and report.merging.merged


def test_an_ip_adapter_under_a_processor_set_by_itself_is_refused_in_words(pipe):
    pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5))
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    states = torch.zeros(1, 4, 16)
    with pytest.raises(TypeError, match="use apply_token_merging"):
        attention(states, encoder_hidden_states=(states, [states]))


REPLACED = {
    "sliced": lambda pipe: pipe.enable_attention_slicing(),
    "fused": lambda pipe: pipe.fuse_qkv_projections(vae=False),
    "default": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
}


@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("switch", SWITCHES)
def test_processors_that_are_replaced_later_are_noticed_once_and_the_report_says_so(how, switch, pipe):
    plain = generate(pipe)
    report = SWITCHES[switch](pipe, 0.5)
    merged = generate(pipe)
    processors = pipe.unet.attn_processors
    REPLACED[how](pipe)
    with pytest.warns(UserWarning, match="merges nothing any more: the attention processors were replaced by"):
        untouched = generate(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(generate(pipe), untouched)
    torch.testing.assert_close(untouched, plain, atol=2e-3, rtol=0)  # by another kernel
    assert not torch.equal(untouched, merged)
    if switch != "drop-in":
        assert not report.merged and all("was replaced by" in layer.reason for layer in report.layers)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pipe.unfuse_qkv_projections(vae=False) if how == "fused" else pipe.unet.set_attn_processor(processors)
            assert torch.equal(generate(pipe), merged) and report.merged  # from the first picture on
            assert torch.equal(generate(pipe), merged)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with pytest.warns(UserWarning, match="merges nothing any more") if switch != "drop-in" else nullcontext():
        generate(pipe)  # and again when it stops later
    remove_token_merging(pipe)
    assert torch.equal(generate(pipe), plain) and not hooks(pipe)


def test_a_preset_after_fused_projections_gives_the_same_first_picture(pipe):
    apply_preset(pipe, "fast", force=True)
    picture = generate(pipe)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.warns(UserWarning, match="were replaced by FusedAttnProcessor2_0"):
        generate(pipe)
    pipe.unfuse_qkv_projections(vae=False)
    assert torch.equal(generate(pipe), picture) and torch.equal(generate(pipe), picture)


def test_a_processor_set_over_applied_merging_takes_its_place_without_a_word(pipe):
    apply_token_merging(pipe, ratio=0.5, full_steps=2)
    former = generate(pipe)
    processors = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(pipe)
        assert merging_report(pipe).removed[1] == 0.25
        pipe.unet.set_attn_processor(processors)
        generate(pipe)
        assert torch.equal(generate(pipe), former) and merging_report(pipe).kept_bytes > 0


def test_what_was_removed_does_not_come_back_by_itself(pipe):
    plain = generate(pipe)
    apply_token_merging(pipe, ratio=0.5)
    pipe.fuse_qkv_projections(vae=False)
    remove_token_merging(pipe)
    pipe.unfuse_qkv_projections(vae=False)  # puts processors back whose merging is off
    waiting = ToMeProcessor(ratio=0.5)
    with pytest.warns(UserWarning, match="nothing is switched on"), generation(pipe):
        assert torch.equal(generate(pipe), plain)
    assert torch.equal(generate(pipe), plain) and not waiting.attachment.attached


def test_a_scope_goes_on_after_processors_were_put_back(pipe):
    report = apply_token_merging(pipe, ratio=0.5, full_steps=2)
    processors, call = pipe.unet.attn_processors, (INPUTS["sample"], INPUTS["encoder_hidden_states"])
    with torch.no_grad(), generation(pipe):
        pipe.unet(call[0], 100, call[1])
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        with pytest.warns(UserWarning, match="merges nothing any more"):
            pipe.unet(call[0], 200, call[1])
        pipe.unet.set_attn_processor(processors)
        for timestep in (300, 400, 500):
            pipe.unet(call[0], timestep, call[1])
    assert len(report.steps) == 4  # of one generation


def test_two_controlnets_have_settings_of_their_own():
    pipe = make_pipeline("controlnet")
    nets = MultiControlNetModel([pipe.controlnet, copy.deepcopy(pipe.controlnet)])
    pipe.controlnet = nets
    for net, ratio in zip(nets.nets, (0.5, 0.25), strict=True):
        net.set_attn_processor(ToMeProcessor(ratio=ratio))
    for _ in range(2):
        generate(pipe, image=[torch.zeros(1, 3, 32, 32)] * 2)
        removed = [net.attn_processors.popitem()[1].attachment.record.value for net in nets.nets]
        assert [[step.removed[1] for step in each.steps] for each in removed] == [[0.5] * 4, [0.25] * 4]
