"""Proportional attention without a mask, and diffusers' attention backends."""

import pytest
import torch
from conftest import INPUTS, attention_layer, make_unet
from diffusers.models.attention_processor import AttnProcessor2_0

import tomesd_plus.host.attention
from tomesd_plus import ToMeProcessor
from tomesd_plus.host.attention import attention


@pytest.mark.parametrize("whole_queries", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_extra_channel_does_what_the_mask_does(dtype, whole_queries):
    attn, x = attention_layer()
    attn, x = attn.to(dtype), x.to(dtype)
    merged = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    sizes = torch.randint(1, 40, (2, 24), generator=torch.Generator().manual_seed(2))
    queries = x if whole_queries else merged
    with torch.no_grad():
        masked = AttnProcessor2_0()(
            attn, queries, merged, sizes.to(torch.promote_types(dtype, torch.float32)).log()[:, None].to(dtype)
        )
        channel = attention(attn, queries, merged, sizes)
        unweighted = attention(attn, queries, merged)
    tolerance = 4 * torch.finfo(dtype).eps
    assert channel.dtype == dtype and channel.shape == queries.shape
    torch.testing.assert_close(channel, masked, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(unweighted, AttnProcessor2_0()(attn, queries, merged), atol=tolerance, rtol=tolerance)
    assert (masked - unweighted).abs().max() > 2 * tolerance


def test_attention_backends_are_honoured():
    """What `set_attention_backend` chooses is what runs, at every layer, with the same picture."""
    unet = make_unet()
    unet.set_attn_processor(ToMeProcessor(ratio=0.5))
    with torch.no_grad():
        before = unet(**INPUTS, timestep=700).sample
        seen = []

        def spy(query, key, value, **options):
            seen.append(options["backend"])
            return dispatch(query, key, value, **options)

        dispatch = tomesd_plus.host.attention.dispatch_attention_fn
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tomesd_plus.host.attention, "dispatch_attention_fn", spy)
            unet(**INPUTS, timestep=700)
            assert not seen  # nothing was set
            unet.set_attention_backend("native")
            after = unet(**INPUTS, timestep=700).sample
    assert len(seen) == len(unet.attn_processors) and set(seen) == {"native"}
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
