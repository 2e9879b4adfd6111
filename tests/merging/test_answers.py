"""Layers that are left alone, and the reasons that the report gives."""

import pytest
import torch
from conftest import make_unet
from diffusers.models.attention_processor import AttnProcessor2_0

from tomesd_plus import (
    apply_token_merging,
)


def test_masks_are_left_alone_and_reported():
    unet = make_unet()
    inputs = {"sample": torch.randn(2, 4, 16, 16), "timestep": 500, "encoder_hidden_states": torch.randn(2, 7, 16)}
    mask = torch.ones(2, 256)
    mask[:, 5] = 0
    plain = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    seen = []

    def with_mask(attention, args, kwargs):
        kwargs["attention_mask"] = mask
        seen.append(args[0])
        return args, kwargs

    plain.register_forward_pre_hook(with_mask, with_kwargs=True)
    outputs = []
    plain.register_forward_hook(lambda attention, args, output: outputs.append(output))
    unet(**inputs)
    report = apply_token_merging(unet, ratio=0.5)
    unet(**inputs)
    assert report.merged and torch.equal(seen[0], seen[1])
    assert torch.equal(outputs[0], outputs[1])
    assert str(report.layers[0].reason) == "it has an attention mask" and not report.layers[0].removed


def test_layers_whose_processors_cannot_be_wrapped_are_left_alone_and_reported():
    class WithArguments(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, strength=1.0):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    unet = make_unet()
    inputs = (torch.randn(2, 4, 16, 16), 500, torch.randn(2, 7, 16))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    unet.get_submodule(name).set_processor(WithArguments())
    with pytest.warns(UserWarning, match=f"leaves {name} alone"):
        report = apply_token_merging(unet, ratio=0.5)
    unet(*inputs)
    reasons = {layer.name: str(layer.reason) for layer in report.layers}
    assert report.merged and "arguments of its own (strength)" in reasons[name]
    assert type(unet.get_submodule(name).processor) is WithArguments


@pytest.mark.parametrize("options", [{"sides": "keys_values"}, {"sides": "queries"}])
def test_fused_projections_are_left_alone_where_queries_and_keys_differ(options):
    unet = make_unet()
    unet.fuse_qkv_projections()
    inputs = (torch.randn(2, 4, 16, 16), 500, torch.randn(2, 7, 16))
    plain = unet(*inputs).sample
    report = apply_token_merging(unet, ratio=0.5, **options)
    with pytest.warns(UserWarning, match="fused"):
        assert torch.equal(unet(*inputs).sample, plain) and not report.merged
    assert "its projections are fused" in str(report)
