"""Weights that are loaded beside a model's own: IP-Adapters, LoRA, textual inversion."""

from functools import partial

import pytest
import torch
from conftest import WIDTH, generate, make_pipeline
from pipeline_tools import WAYS, Row, cells, check, draw, noise, slow
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

# IP-Adapter ----------------------------------------------------------------------------------------------------------


def with_image_encoder():
    torch.manual_seed(0)
    pipe = make_pipeline("sd")
    config = CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                              image_size=32, patch_size=8, projection_dim=WIDTH)  # fmt: skip
    encoder = CLIPVisionModelWithProjection(config).eval()
    pipe.register_modules(
        image_encoder=encoder, feature_extractor=CLIPImageProcessor(size=32, crop_size=32, do_rescale=False)
    )
    return pipe


def adapter_weights(unet):
    """An IP-Adapter's weights for a UNet, as a file of them has them."""
    torch.manual_seed(0)
    layers, number = {}, 1
    for name in unet.attn_processors:
        if "attn2" in name:
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            layers |= {f"{number}.to_{which}_ip.weight": torch.randn(width, WIDTH) for which in "kv"}
            number += 2
    tokens = 4 * WIDTH
    image = {"proj.weight": torch.randn(tokens, WIDTH) / 4, "proj.bias": torch.zeros(tokens)}
    return {"image_proj": image | {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)},
            "ip_adapter": layers}  # fmt: skip


def load_ip(pipe):
    pipe.load_ip_adapter(adapter_weights(pipe.unet), subfolder=None, weight_name=None)


def load_and_scale(pipe):
    load_ip(pipe)
    pipe.set_ip_adapter_scale(0.5)


def unload_ip(pipe):
    image_encoder, feature_extractor = pipe.image_encoder, pipe.feature_extractor
    pipe.unload_ip_adapter()
    pipe.register_modules(image_encoder=image_encoder, feature_extractor=feature_extractor)


def load_and_unload_ip(pipe):
    load_ip(pipe)
    unload_ip(pipe)


with_picture = partial(draw, ip_adapter_image=noise(1, 3, 32, 32))
with_mask = partial(
    with_picture, cross_attention_kwargs={"ip_adapter_masks": [(torch.arange(32) < 16).float().expand(1, 1, 32, 32)]}
)
THREE = ("merging", "cache", "bare")

# LoRA, textual inversion ---------------------------------------------------------------------------------------------


def lora_weights(unet):
    """LoRA weights of all attention layers, as a file of them has them."""
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    return {f"unet.{name}": weight for name, weight in get_peft_model_state_dict(unet).items()}


def load_lora(pipe):
    pytest.importorskip("peft")
    pipe.load_lora_weights(lora_weights(make_pipeline("sd").unet), adapter_name="one")


def fuse(pipe):
    load_lora(pipe)
    pipe.fuse_lora()


def scale_lora(pipe):
    load_lora(pipe)
    pipe.set_adapters(["one"], adapter_weights=[0.5])


def load_and_unload_lora(pipe):
    load_lora(pipe)
    pipe.unload_lora_weights()


def load_word(pipe):
    pipe.load_textual_inversion({"<toy>": torch.ones(WIDTH)}, token="<toy>")


SCALED = partial(draw, cross_attention_kwargs={"scale": 0.5})

ROWS = [
    Row("IP-Adapter, loaded before", with_image_encoder, with_picture, before=load_ip, ways=THREE, fast=THREE,
        refuses={"bare": "use apply_token_merging"}),
    Row("IP-Adapter, loaded later", with_image_encoder, with_picture, then=load_ip, ways=THREE, fast=THREE),
    Row("IP-Adapter, unloaded", with_image_encoder, before=load_ip, then=unload_ip, ways=THREE, fast=THREE),
    slow(Row("IP-Adapter, loaded and unloaded", with_image_encoder, then=load_and_unload_ip, ways=THREE)),
    slow(Row("IP-Adapter, scale", with_image_encoder, with_picture, before=load_and_scale)),
    slow(Row("IP-Adapter, masks", with_image_encoder, with_mask, before=load_ip)),
    Row("LoRA, loaded before", lambda: make_pipeline("sd"), before=load_lora, ways=THREE),
    Row("LoRA, loaded later", lambda: make_pipeline("sd"), then=load_lora, ways=THREE),
    slow(Row("LoRA, fused before", lambda: make_pipeline("sd"), before=fuse)),
    slow(Row("LoRA, fused later", lambda: make_pipeline("sd"), then=fuse)),
    slow(Row("LoRA, scale", lambda: make_pipeline("sd"), SCALED, before=load_lora)),
    slow(Row("LoRA, weight of an adapter", lambda: make_pipeline("sd"), then=scale_lora)),
    slow(Row("LoRA, unloaded", lambda: make_pipeline("sd"), before=load_lora,
             then=lambda pipe: pipe.unload_lora_weights())),
    Row("Textual inversion", lambda: make_pipeline("sd"), partial(draw, prompt="a <toy>"), before=load_word),
]  # fmt: skip


@cells(ROWS)
def test_cell(row, way, record_property):
    check(row, way, record_property)


@pytest.mark.parametrize("load", [load_ip, load_lora, load_word])
def test_what_is_loaded_changes_the_picture(load):
    """Else the rows above would say nothing."""
    pipe = with_image_encoder()
    options = {"ip_adapter_image": noise(1, 3, 32, 32)} if load is load_ip else {}
    plain = generate(pipe, prompt="a <toy>")
    load(pipe)
    assert not torch.equal(generate(pipe, prompt="a <toy>", **options), plain)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["merging", "cache"])
def test_after_unloading_the_picture_is_that_of_a_pipeline_that_never_loaded(way):
    pipe = make_pipeline("sd")
    WAYS[way].on(pipe, 1, 0.5)
    expected = draw(pipe)
    load_and_unload_lora(pipe)
    assert torch.equal(draw(pipe), expected)
