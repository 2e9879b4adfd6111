"""Processors that a host makes anew, wraps, registers, traces."""

import copy
import pickle

import pytest
import torch
from conftest import INPUTS, generate, make_unet
from diffusers.models.attention_processor import AttnProcessor2_0

from tomesd_plus import ToMeProcessor, apply_feature_cache, apply_token_merging, remove_token_merging


def remake(unet):
    """As loading or unloading an IP-Adapter does."""
    unet.set_attn_processor({name: each.__class__() for name, each in unet.attn_processors.items()})


@pytest.mark.parametrize("ratio", [0.0, 0.25])
@pytest.mark.parametrize("when", ["before the first call", "after it", "twice"])
def test_settings_survive(pipe, ratio, when):
    plain = generate(pipe)
    pipe.unet.set_attn_processor(ToMeProcessor(ratio=ratio))
    expected = generate(copy.deepcopy(pipe))
    if when != "before the first call":
        assert torch.equal(generate(pipe), expected)
    for _ in range(1 + (when == "twice")):
        remake(pipe.unet)
    assert torch.equal(generate(pipe), expected) and torch.equal(generate(pipe), expected)
    assert torch.equal(expected, plain) == (ratio == 0)
    remove_token_merging(pipe)
    assert torch.equal(generate(pipe), plain)


def test_a_class_with_settings_is_a_processor_like_any_other():
    processor = ToMeProcessor(ratio=0.25)
    assert isinstance(processor, ToMeProcessor) and type(processor).__name__ == "ToMeProcessor"
    for twin in (processor, copy.deepcopy(processor), pickle.loads(pickle.dumps(processor)), type(processor)()):
        assert twin.attachment.config.ratio == 0.25 and type(twin) is type(processor)
    assert type(ToMeProcessor(ratio=0.25)) is type(processor)
    assert ToMeProcessor().attachment.config.ratio != 0.25
    assert type(processor)(ratio=0.5).attachment.config.ratio == 0.5


@pytest.mark.parametrize("bare", [True, False])
def test_guiders_find_the_processors_in_the_hosts_registry(pipe, bare):
    from diffusers.hooks import LayerSkipConfig
    from diffusers.hooks.layer_skip import _apply_layer_skip_hook

    if bare:
        pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5))
    else:
        apply_token_merging(pipe, ratio=0.5)
    merged = generate(pipe)
    block = "down_blocks.0.attentions.0.transformer_blocks"
    skip = LayerSkipConfig(indices=[0], fqn=block, skip_attention=True, skip_ff=False)
    _apply_layer_skip_hook(pipe.unet, skip, name="skip")
    assert not torch.equal(generate(pipe), merged)


@pytest.mark.parametrize(
    "switch",
    [
        lambda unet: apply_token_merging(unet, ratio=0.5),
        lambda unet: unet.set_attn_processor(ToMeProcessor(ratio=0.5)),
        apply_feature_cache,
    ],
    ids=["apply", "bare", "cache"],
)
@pytest.mark.parametrize("how", ["trace", "export"])
def test_traces_and_exports_are_refused_in_words(switch, how):
    class Plain(torch.nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet = unet

        def forward(self, sample, timestep, text):
            return self.unet(sample, timestep, text).sample

    model, inputs = Plain(make_unet()), (torch.randn(2, 4, 16, 16), torch.tensor(500), torch.randn(2, 7, 16))
    switch(model.unet)
    with pytest.raises(RuntimeError, match="cannot be traced or exported"):
        if how == "trace":
            torch.jit.trace(model, inputs, check_trace=False)
        else:
            torch.export.export(model, inputs, strict=False)
    with torch.no_grad():
        assert model(*inputs).isfinite().all()


class Shuffling(AttnProcessor2_0):
    """Attends inside halves, as HyperTile does in tiles."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        halves = hidden_states.unflatten(1, (2, -1)).flatten(0, 1)
        return super().__call__(attn, halves).unflatten(0, (-1, 2)).flatten(1, 2)


def test_processors_of_others_are_left_alone_unless_they_say_that_order_does_not_matter(pipe):
    pipe.unet.set_attn_processor(Shuffling())
    plain = generate(pipe)
    with pytest.warns(UserWarning, match="does nothing to unet"):
        report = apply_token_merging(pipe, ratio=0.5)
    assert torch.equal(generate(pipe), plain) and not report.merged
    assert len(report.layers) == 7 and all(
        "Shuffling is not one of diffusers'" in layer.reason for layer in report.layers
    )
    Shuffling.permutation_equivariant = True
    try:
        report = apply_token_merging(pipe, ratio=0.5)
        generate(pipe)
        assert report.merged
    finally:
        del Shuffling.permutation_equivariant


def test_an_attention_layer_whose_batch_is_tiles_is_left_alone():
    unet = make_unet()
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    forward = type(attention).forward

    def tiled(hidden_states, **kwargs):
        tiles = hidden_states.unflatten(1, (4, -1)).flatten(0, 1)
        return forward(attention, tiles, **kwargs).unflatten(0, (-1, 4)).flatten(1, 2)

    attention.forward = tiled
    with torch.no_grad():
        plain = unet(**INPUTS, timestep=500).sample
        report = apply_token_merging(unet, ratio={2: 0.5})  # tiles have as many tokens as level 2
        for layer in unet.modules():
            if getattr(layer, "is_cross_attention", True) is False and layer is not attention:
                layer.set_processor(AttnProcessor2_0())
        assert torch.equal(unet(**INPUTS, timestep=500).sample, plain)
    with pytest.warns(
        UserWarning, match="merged nothing: its batch of 8 is not the call's 2: its tokens may be tiles"
    ):
        assert not report.merged
