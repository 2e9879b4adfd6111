"""Joint attention: the host's own bits' worth where nothing is merged, and keys that weigh what they stand for."""

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from transformer_tools import make_transformer

from tomesd_plus.host.attention import attend
from tomesd_plus.host.joint_attention import Tokens, is_known, joint_attention

FAMILIES = ["sd3", "sd35", "flux"]


def layer_and_inputs(family):
    """The first block's joint attention with image and text tokens, and rotary embeddings where it has some."""
    torch.manual_seed(1)
    attn = make_transformer(family).transformer_blocks[0].attn
    image, text = torch.randn(2, 12, 32), torch.randn(2, 5, 32)
    angles = torch.rand(17, 8).repeat_interleave(2, dim=1)
    return attn, image, text, (angles.cos(), angles.sin()) if family == "flux" else None


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_hosts_attention_where_every_token_stands_for_itself(family):
    attn, image, text, rotary = layer_and_inputs(family)
    extra = {} if rotary is None else {"image_rotary_emb": rotary}
    expected = attn(image, encoder_hidden_states=text, **extra)
    tokens = Tokens(image, rotary)
    for sizes in (None, torch.ones(2, 12, dtype=torch.int64)):
        found = joint_attention(attn, tokens, tokens, text, sizes)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_of_size_three_weighs_like_three_keys_and_text_like_one(family):
    attn, image, text, rotary = layer_and_inputs(family)
    repeats = torch.tensor([3, *[1] * 10, 2])
    several = image.repeat_interleave(repeats, dim=1)
    places = torch.cat([torch.arange(5), 5 + torch.arange(12).repeat_interleave(repeats)])
    longer = None if rotary is None else tuple(each[places] for each in rotary)
    queries = Tokens(image, rotary)
    expected = joint_attention(attn, queries, Tokens(several, longer), text)
    found = joint_attention(attn, queries, Tokens(image, rotary), text, repeats.expand(2, -1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_extra_channel_and_the_mask_are_the_same(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 9, 3, 16).to(dtype) for _ in range(3))
    sizes = torch.randint(1, 9, (2, 9))
    tolerance = {} if dtype in (torch.float32, torch.float64) else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(
        attend(query, key, value, sizes), attend(query, key, value, sizes, masked=True), **tolerance
    )


def test_subclasses_of_known_processors_are_unknown():
    class Other(JointAttnProcessor2_0):
        pass

    assert is_known(JointAttnProcessor2_0()) and is_known(FluxAttnProcessor())
    assert not is_known(Other()) and not is_known(None)
