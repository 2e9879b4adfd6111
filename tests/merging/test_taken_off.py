"""Processors that somebody else puts in the place of ours: all or some, before the first call or later."""

import copy
import gc
import warnings

import pytest
import torch
from conftest import INPUTS, generate, make_pipeline, make_unet
from diffusers import StableDiffusionPAGPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from pipeline_tools import of
from torch.nn.modules import module as torch_module

from tomesd_plus import ToMeProcessor, apply_token_merging, merging_report, remove_token_merging, token_merging, tomesd

FINEST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1"


class Controlled:
    """As prompt-to-prompt's: hands the attention maps to a controller, which may change them."""

    def __init__(self, controller):
        self.controller = controller

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(each) for each in (attn.to_q(hidden_states), attn.to_k(states), attn.to_v(states))
        )
        maps = attn.get_attention_scores(query, key, attention_mask)
        self.controller.append(tuple(maps.shape))
        return attn.to_out[0](attn.batch_to_head_dim(maps @ value))


class Foreign(AttnProcessor2_0):
    """Of nobody knows what."""


def set_by_a_pipeline(unet, processor):
    """As those of the host's pipelines do that set processors of their own for a call."""
    names = {"__name__": "diffusers.pipelines.made_up", "unet": unet, "processor": processor}
    exec("unet.set_attn_processor(processor)", names)


def run(unet, *timesteps):
    with torch.no_grad():
        return [unet(**INPUTS, timestep=timestep).sample for timestep in timesteps or (900, 500)][-1]


def told(action, *arguments):
    """What merging says while something runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action(*arguments)
        gc.collect()
    return [str(each.message) for each in caught if str(each.message).startswith("Token merging")]


def layers(report):
    return {layer.name: layer for layer in report.layers}


# Before the first call -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("met", [False, True])
def test_a_bare_processor_that_a_pipeline_replaces_is_told_of_once_each_time(met, processor):
    unet = make_unet()
    plain = run(make_unet())
    hooks = len(torch_module._global_forward_pre_hooks)
    for _ in range(2):
        unet.set_attn_processor(ToMeProcessor(ratio=0.5))
        assert not met or not torch.equal(run(unet), plain)
        set_by_a_pipeline(unet, processor)
        (message,) = told(run, unet)
        assert f"ToMeProcessor was replaced by {type(processor).__name__}. Use apply_token_merging" in message
        assert told(run, unet) == []
        torch.testing.assert_close(run(unet), plain, atol=2e-3, rtol=0)
        assert len(torch_module._global_forward_pre_hooks) == hooks


def test_attention_slicing_over_a_bare_processor_is_told_of(pipe):
    pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5))
    pipe.enable_attention_slicing()
    (message,) = told(generate, pipe)
    assert "replaced by SlicedAttnProcessor" in message
    assert told(generate, pipe) == []


@pytest.mark.parametrize("met", [False, True])
def test_foreign_processors_over_a_bare_one_are_told_of_and_default_ones_take_it_off(met):
    for processor, words in ((Controlled([]), "replaced by Controlled"), (AttnProcessor2_0(), None)):
        unet = make_unet()
        unet.set_attn_processor(ToMeProcessor(ratio=0.5))
        if met:
            run(unet)
        unet.set_attn_processor(processor)
        messages = told(run, unet)
        assert [words in each for each in messages] == [True] if words else messages == []


@pytest.mark.parametrize("how", ["thrown away", "held", "replaced by another", "removed", "a copy", "refused"])
def test_no_word_of_a_processor_that_nobody_has_taken_off(how, pipe):
    hooks = len(torch_module._global_forward_pre_hooks)
    if how == "removed":
        pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5))
        remove_token_merging(pipe)
    elif how == "replaced by another":
        pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.25))
        set_by_a_pipeline(pipe.unet, ToMeProcessor(ratio=0.5))
    elif how == "a copy":
        pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5))
        another = copy.deepcopy(pipe)
        del another
    elif how == "refused":
        with pytest.raises(ValueError):
            ToMeProcessor(ratio=2.0)
    held = ToMeProcessor(ratio=0.5) if how == "held" else None
    if how == "thrown away":
        ToMeProcessor(ratio=0.5)
    assert told(generate, pipe) == []
    del held
    assert told(generate, pipe) == [] and len(torch_module._global_forward_pre_hooks) == hooks
    if how in ("replaced by another", "a copy"):
        assert merging_report(pipe).removed[1] == 0.5


def test_a_bare_processor_that_somebody_holds_is_told_of_where_a_pipelines_own_run():
    unet = make_unet()
    held = ToMeProcessor(ratio=0.5)
    unet.set_attn_processor(held)
    set_by_a_pipeline(unet, type("Own", (AttnProcessor2_0,), {"__module__": "diffusers.pipelines.made_up"})())
    (message,) = told(run, unet)
    assert "if ToMeProcessor was set on this UNet, its pipeline has replaced it by Own" in message
    assert told(run, unet) == []
    with pytest.raises(ValueError, match="a pipeline sets processors of its own"):
        merging_report(unet)
    unet.set_attn_processor(held)
    assert told(run, unet) == [] and merging_report(unet).merged


# Some layers ---------------------------------------------------------------------------------------------------------


SWITCHES = {
    "merging": lambda unet: apply_token_merging(unet, ratio=0.5),
    "whole blocks": lambda unet: apply_token_merging(unet, ratio=0.5, layers="block"),
    "bare": lambda unet: unet.set_attn_processor(ToMeProcessor(ratio=0.5)),
    "drop-in": lambda unet: tomesd.apply_patch(unet, ratio=0.5),
}


@pytest.mark.parametrize("switch", ["merging", "bare", "drop-in"])
@pytest.mark.parametrize("processor", [AttnProcessor2_0(), Foreign()], ids=lambda p: type(p).__name__)
def test_a_layer_with_another_processor_is_told_of_once_and_again_when_it_happens_later(processor, switch):
    unet = make_unet()
    SWITCHES[switch](unet)
    assert told(run, unet) == []
    report = merging_report(unet)
    assert report.removed[1] == 0.5
    layer = unet.get_submodule(FINEST)
    ours = layer.processor
    for _ in range(2):
        layer.set_processor(processor)
        words = f"its processor was replaced by {type(processor).__name__}"
        (message,) = told(lambda: (run(unet), str(report)))
        assert message.startswith(f"Token merging leaves layers alone: {FINEST}: {words}") and "Put the" in message
        assert told(lambda: (run(unet), str(report))) == []
        record = layers(report)[FINEST]
        assert words in record.reason and (record.downsample, record.calls, record.removed) == (1, 2, 0)
        assert report.removed[1] == pytest.approx(0.5 * 2 / 3)  # two of three layers are merged
        layer.set_processor(ours)
        assert told(lambda: (run(unet), str(report))) == [] and report.removed[1] == 0.5
        assert layers(report)[FINEST].reason is None


def test_a_layer_that_was_not_to_be_merged_is_in_the_report_only():
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5)
    unet.get_submodule(MIDDLE).set_processor(AttnProcessor())
    assert told(lambda: (run(unet), str(report))) == []
    assert "its processor was replaced by AttnProcessor" in layers(report)[MIDDLE].reason
    assert layers(report)[MIDDLE].downsample == 2


def test_all_layers_of_the_level_with_other_processors_is_nothing_merged():
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5)
    for name in (FINEST, *(name for name, _ in unet.named_modules() if name.startswith("up_blocks.1"))):
        if name.endswith("attn1"):
            unet.get_submodule(name).set_processor(AttnProcessor())
    (message,) = told(lambda: (run(unet), str(report)))
    assert "has merged nothing" in message and "its processor was replaced by AttnProcessor" in message


@pytest.mark.parametrize("layer", ["mid", "down_blocks.0"])
@pytest.mark.parametrize("way", ["merging", "bare"])
def test_a_pipelines_own_for_its_call_is_in_the_report_and_no_surprise(layer, way):
    pipe = of(StableDiffusionPAGPipeline, pag_applied_layers=[layer])
    SWITCHES[way](pipe.unet)
    generate(pipe)
    assert told(generate, pipe) == []
    report = merging_report(pipe)
    name = MIDDLE if layer == "mid" else FINEST
    assert "PAGCFGIdentitySelfAttnProcessor2_0 is a pipeline's own" in layers(report)[name].reason
    assert layers(report)[name].calls == 4
    assert report.removed[1] == (0.5 if layer == "mid" else pytest.approx(0.5 * 2 / 3))


# Processors that keep or change attention maps -----------------------------------------------------------------------


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("block", [False, True])
def test_maps_that_a_controller_gets_stay_those_of_all_tokens(block, some):
    """Set before merging, applied or in a ``with`` block."""
    unet, controller = make_unet(), []
    processor = Controlled(controller)
    names = [name for name in unet.attn_processors if not some or name.startswith("down_blocks.0")]
    unet.set_attn_processor({**unet.attn_processors, **dict.fromkeys(names, processor)})
    plain = run(unet)
    shapes, controller[:] = list(controller), []
    words = f"leaves {FINEST} alone" if some else "does nothing to model: no self-attention layer can be merged"
    with pytest.warns(UserWarning, match=words + ".*Controlled keeps or changes attention maps"):
        context = token_merging(unet, ratio=0.5)
        report = context.__enter__() if block else apply_token_merging(unet, ratio=0.5)
    assert torch.equal(run(unet), plain) != some and controller == shapes
    assert "Controlled keeps or changes attention maps" in layers(report)[FINEST].reason
    assert report.merged == some
    if block:
        context.__exit__(None, None, None)
    elif some:
        remove_token_merging(unet)
    assert torch.equal(run(unet), plain)
    assert all(unet.attn_processors[name] is processor for name in names)


class Scaled:
    """Takes an argument of its own."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, strength=1.0):
        return AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask) * strength


class Module(torch.nn.Module):
    """A processor with weights."""

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask)


@pytest.mark.parametrize(
    ("processor", "words"),
    [(Scaled(), "takes arguments of its own"), (Module(), "is a module"), (Foreign(), "set permutation_equivariant")],
    ids=lambda value: type(value).__name__,
)
def test_one_layer_that_cannot_be_merged_is_told_of_when_merging_is_applied(processor, words):
    unet = make_unet()
    unet.get_submodule(FINEST).set_processor(processor)
    (message,) = told(apply_token_merging, unet, 0.5)
    assert message.startswith(f"Token merging leaves {FINEST} alone: ") and words in message
    assert told(lambda: (run(unet), str(merging_report(unet)))) == [] and merging_report(unet).merged


@pytest.mark.parametrize("block", [False, True])
def test_a_controller_set_over_merging_is_told_of_with_what_to_do(block):
    unet, controller = make_unet(), []
    context = token_merging(unet, ratio=0.5)
    report = context.__enter__() if block else apply_token_merging(unet, ratio=0.5)
    run(unet)
    former = unet.attn_processors
    unet.set_attn_processor(Controlled(controller))
    (message,) = told(run, unet)
    assert "were replaced by Controlled. Put the former ones back: apply_token_merging merges around none" in message
    assert controller and not report.merged and told(run, unet) == []
    unet.set_attn_processor(former)
    run(unet)
    assert report.merged
    unet.set_attn_processor(Controlled(controller))
    if block:
        context.__exit__(None, None, None)
        assert type(unet.get_submodule(FINEST).processor) is Controlled  # it stays where the user has put it
    assert not block or told(run, unet) == []


# A ControlNet beside a UNet ------------------------------------------------------------------------------------------


def controlled_pipe(**levels):
    """A pipeline whose ControlNet has attention at level 2 only."""
    from diffusers import ControlNetModel

    pipe = make_pipeline("controlnet")
    torch.manual_seed(0)
    pipe.controlnet = ControlNetModel.from_config(pipe.controlnet.config, **levels).eval()
    return pipe


def test_a_controlnet_that_has_not_the_level_is_no_broken_promise():
    pipe = controlled_pipe(down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"])
    report = apply_token_merging(pipe, ratio=0.5)
    assert told(generate, pipe) == [] and report.merged
    assert {layer.reason for layer in report.layers if layer.name.startswith("controlnet")} == {
        "level 2 is not merged by the configuration"
    }
    remove_token_merging(pipe)
    report = apply_token_merging(pipe.controlnet, ratio=0.5)  # by itself it is what was asked for
    (message,) = told(lambda: (generate(pipe), str(report)))
    assert "set max_downsample=2" in message


def test_a_controlnet_without_attention_is_no_broken_promise():
    pipe = controlled_pipe(down_block_types=["DownBlock2D", "DownBlock2D"], mid_block_type="UNetMidBlock2D")
    assert told(apply_token_merging, pipe, 0.5) == []
    assert told(generate, pipe) == [] and merging_report(pipe).merged


def test_a_controlnet_that_has_the_level_and_merges_nothing_is_told_of():
    pipe = make_pipeline("controlnet")
    pipe.controlnet.set_attn_processor(Foreign())
    (message,) = told(apply_token_merging, pipe, 0.5)
    assert "does nothing to controlnet" in message and "Foreign is not one of diffusers'" in message
    assert told(generate, pipe) == [] and merging_report(pipe).merged
    remove_token_merging(pipe)
    pipe.controlnet.set_attn_processor(AttnProcessor2_0())
    apply_token_merging(pipe, 0.5)
    for name, layer in pipe.controlnet.named_modules():
        if name == FINEST:
            layer.set_processor(AttnProcessor())
    (message,) = told(generate, pipe)
    assert "has merged nothing in controlnet" in message and "was replaced by AttnProcessor" in message
