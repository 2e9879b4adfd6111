"""Attention by a mask and by extra channels."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.vision_tools import forward, make_tower
from tomesd_plus import apply_token_merging
from tomesd_plus.vision import attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_channels_weigh_keys_as_a_mask_does(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 20, 16, generator=generator).to(dtype) for _ in range(3))
    sizes = torch.randint(1, 40, (2, 20), generator=generator).float()
    log_sizes, scaling = sizes.log()[:, None, None], 0.3
    wide = attention.with_extra_channels(query, key, value, log_sizes, scaling)
    assert all(each.shape == (2, 3, 20, 24) and each.dtype == dtype for each in wide)
    ours = scaled_dot_product_attention(*(each.double() for each in wide), scale=scaling)[..., :16]
    exact = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=log_sizes.double(), scale=scaling
    )
    assert (ours - exact).abs().max() < (1e-5 if dtype == torch.float32 else 2e-4)


@pytest.mark.parametrize("kind", ["vit", "siglip", "dinov3"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_towers_with_extra_channels_give_what_they_give_with_a_mask(kind, implementation, monkeypatch):
    model = make_tower(kind, implementation)
    apply_token_merging(model, r=8)
    by_mask = forward(model)
    masks = []
    sdpa = attention.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def seen(module, query, key, value, mask, **options):
        masks.append(mask)
        return sdpa(module, query, key, value, mask, **options)

    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS, "sdpa", seen)
    monkeypatch.setattr(attention, "MASKED", ())  # as on a GPU
    torch.testing.assert_close(forward(model), by_mask, atol=1e-5, rtol=0)
    assert masks == [None] * len(masks) and bool(masks) == (implementation == "sdpa")


def test_flash_attention_gets_no_mask_and_its_own_name(monkeypatch):
    model = make_tower()
    apply_token_merging(model, r=8)
    expected, seen = forward(model), []
    sdpa = attention.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def flash(module, query, key, value, mask, **options):
        seen.append((module.config._attn_implementation, mask, query.shape[-1], "token_merging" in options))
        assert not module.is_causal and any(isinstance(each, torch.nn.Linear) for each in module.modules())
        return sdpa(module, query, key, value, mask, **options)

    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model.config._attn_implementation_internal = "flash_attention_2"
    torch.testing.assert_close(forward(model), expected, atol=1e-5, rtol=0)
    assert seen == [("flash_attention_2", None, channels, False) for channels in (8, 16, 16, 16)]


def test_the_towers_own_implementation_may_change_while_merging_is_on():
    model = make_tower()
    apply_token_merging(model, r=8)
    before = forward(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(forward(model), before, atol=1e-5, rtol=0)
    with torch.no_grad():
        attentions = model(torch.zeros(1, 3, 32, 32), output_attentions=True).attentions
    assert [each.shape[-1] for each in attentions] == [65, 57, 49, 41]
    assert model.config._attn_implementation == "eager" and "token_merging" not in model.config.to_dict()
