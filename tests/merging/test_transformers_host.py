"""Transformers with what else a host puts on them: ControlNets, IP-Adapters, backends, other processors."""

import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import AttnProcessor, JointAttnProcessor2_0
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from transformer_tools import call, make_pipeline, make_transformer

from tomesd_plus import apply_token_merging, remove_token_merging


def test_a_controlnet_is_left_alone_and_the_transformer_beside_it_merged():
    base = make_pipeline("sd3")
    controlnet = SD3ControlNetModel.from_transformer(
        base.transformer, num_layers=1, num_extra_conditioning_channels=0, load_weights_from_transformer=False
    )
    for layer in controlnet.controlnet_blocks:
        torch.nn.init.normal_(layer.weight, std=0.5)  # zero as built
    pipe = StableDiffusion3ControlNetPipeline(**base.components, controlnet=controlnet.eval())
    pipe.set_progress_bar_config(disable=True)

    def generate():
        picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "a cat", control_image=picture, height=32, width=32, num_inference_steps=2, generator=generator,
            output_type="pt", max_sequence_length=12,
        ).images  # fmt: skip

    untouched = generate()
    report = apply_token_merging(pipe, ratio=0.5)
    merged = generate()
    assert report.merged and not torch.equal(merged, untouched) and torch.equal(generate(), merged)
    assert {layer.name: layer.reason for layer in report.layers}["controlnet"] == (
        "ControlNets of transformers are not merged"
    )
    remove_token_merging(pipe)
    report = apply_token_merging(pipe, ratio=0.5, layers="block")  # a block each: the ControlNet adds between them
    assert not torch.equal(generate(), untouched) and report.merged
    remove_token_merging(pipe)
    report = apply_token_merging(pipe, ratio=0.5, layers="block", blocks_per_run="all")
    with pytest.warns(UserWarning, match="a ControlNet adds to all tokens between the blocks"):
        assert torch.equal(generate(), untouched)
        assert not report.merged
    remove_token_merging(pipe)
    assert torch.equal(generate(), untouched)


def test_layers_with_an_ip_adapter_of_flux_are_left_alone():
    model = make_transformer("flux")
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 32))
    adapters = {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(1, 4, 32)]}}
    untouched = call(model, 8, 8, **adapters)
    report = apply_token_merging(model, ratio=0.5)
    merged = call(model, 8, 8, **adapters)
    assert not torch.equal(merged, untouched)
    removed = {layer.name: layer.share for layer in report.layers}
    assert removed == {
        "transformer_blocks.0.attn": 0, "transformer_blocks.1.attn": 0,
        "single_transformer_blocks.0.attn": 0.5, "single_transformer_blocks.1.attn": 0.5,
    }  # fmt: skip
    assert "is a module" in report.layers[0].reason
    remove_token_merging(model)
    report = apply_token_merging(model, ratio=0.5, layers="block", blocks_per_run="all")
    with pytest.warns(UserWarning, match="its self-attention is left alone"):
        assert torch.equal(call(model, 8, 8, **adapters), untouched)
        assert not report.merged


def test_an_ip_adapter_that_is_loaded_later_is_noticed():
    """The host's loader makes the single blocks' processors anew, as ``cls()``."""
    model = make_transformer("flux")
    apply_token_merging(model, ratio=0.5)
    plain = {}
    for name, processor in model.attn_processors.items():
        plain[name] = type(processor)() if "single" in name else FluxIPAdapterAttnProcessor(32, 32)
    model.set_attn_processor(plain)
    adapters = {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(1, 4, 32)]}}
    with pytest.warns(UserWarning, match="the attention processors were replaced by FluxIPAdapterAttnProcessor"):
        call(model, 8, 8, **adapters)
    remove_token_merging(model)
    names = {type(processor).__name__ for processor in model.attn_processors.values()}
    assert names == {"FluxIPAdapterAttnProcessor", "FluxAttnProcessor"}


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends_are_honoured(backend):
    model = make_transformer("flux")
    plain = call(model, 8, 8)
    report = apply_token_merging(model, ratio=0.5)
    expected = call(model, 8, 8)
    model.set_attention_backend(backend)
    torch.testing.assert_close(call(model, 8, 8), expected)
    assert report.merged
    remove_token_merging(model)
    assert {str(p._attention_backend.value) for p in model.attn_processors.values()} == {backend}
    torch.testing.assert_close(call(model, 8, 8), plain)
    model.reset_attention_backend()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("_attention_backend", AttentionBackendName.SAGE, "its attention backend, sage, takes heads with an extra"),
        ("_parallel_config", object(), "spread over several devices"),
    ],
)
def test_backends_that_are_not_known_and_parallel_attention_are_left_alone(name, value, words, monkeypatch):
    model = make_transformer("flux")
    report = apply_token_merging(model, ratio=0.5)
    plain = call(make_transformer("flux"), 8, 8)
    for processor in model.attn_processors.values():
        setattr(processor, name, value)
        assert getattr(processor.inner, name) is value  # the inner one's own
    attend = transformer_flux.dispatch_attention_fn

    def without(*args, **kwargs):  # neither can run here; older hosts have no parallel_config to give
        return attend(*args, **kwargs | dict.fromkeys(kwargs.keys() & {"backend", "parallel_config"}))

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", without)
    with pytest.warns(UserWarning, match=words):
        assert torch.equal(call(model, 8, 8), plain)
        assert not report.merged


def test_masks_and_other_processors_are_left_alone():
    model = make_transformer("pixart-alpha")
    mask = torch.ones(1, 64)
    plain = call(model, 8, 8, attention_mask=mask)
    report = apply_token_merging(model, ratio=0.5)
    with pytest.warns(UserWarning, match="it has an attention mask"):
        assert torch.equal(call(model, 8, 8, attention_mask=mask), plain)
        assert not report.merged

    class Other(JointAttnProcessor2_0):
        pass

    model = make_transformer("sd3")
    model.set_attn_processor(Other())
    plain = call(model, 8, 8)
    with pytest.warns(UserWarning, match="no attention layer can be merged"):
        report = apply_token_merging(model, ratio=0.5)
    assert torch.equal(call(model, 8, 8), plain)
    assert not report.merged
    assert {layer.reason for layer in report.layers} == {"it is not known what its processor, Other, does"}


def test_pixarts_other_processors_are_merged_around():
    model = make_transformer("pixart-sigma")
    expected = make_transformer("pixart-sigma")
    apply_token_merging(expected, ratio=0.5)
    model.set_attn_processor(AttnProcessor())  # as set_default_attn_processor does
    report = apply_token_merging(model, ratio=0.5)
    torch.testing.assert_close(call(model, 8, 8), call(expected, 8, 8))
    assert report.merged


def test_fused_projections_of_flux_are_left_alone():
    model = make_transformer("flux")
    report = apply_token_merging(model, ratio=0.5)
    merged = call(model, 8, 8)
    model.fuse_qkv_projections()
    call(model, 8, 8)
    assert report.layers[0].reason == "its projections are fused"
    model.unfuse_qkv_projections()
    torch.testing.assert_close(call(model, 8, 8), merged)


@pytest.mark.parametrize("family", ["pixart-alpha", "sd3"])  # not Flux, whose layers the host's own fails on
def test_guiders_that_leave_attention_out_find_the_processors(family):
    layer_skip = pytest.importorskip("diffusers.hooks.layer_skip")
    model, plain = make_transformer(family), make_transformer(family)
    apply_token_merging(model, ratio=0.0)
    untouched = call(plain, 8, 8)
    skip = layer_skip.LayerSkipConfig(
        indices=[1], fqn="transformer_blocks", skip_attention=True, skip_attention_scores=False, skip_ff=False
    )
    layer_skip.apply_layer_skip(model, skip)
    output = call(model, 8, 8)
    assert output.shape == untouched.shape and not torch.equal(output, untouched)
