"""What the layers of one model share: gradients, layers left alone, models changed under the merger's feet."""

import torch
from conftest import generate, hooks, make_pipeline, make_unet
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0

from tomesd_plus import ToMeProcessor, apply_token_merging, remove_token_merging


def test_gradients_in_training_mode():
    unet = make_unet().train()
    report = apply_token_merging(unet, ratio=0.5, merge_mlp=True)
    unet(torch.randn(2, 4, 16, 16), 500, torch.randn(2, 7, 16)).sample.square().mean().backward()
    assert report.merged
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def test_gradient_checkpointing_runs_the_same_plans_again():
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet().train()
        report = apply_token_merging(unet, ratio=0.5, merge_mlp=True)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        text = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
        unet(sample, 500, text).sample.square().mean().backward()
        assert report.merged
        gradients.append([p.grad for p in unet.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


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
    assert report.layers[0].reason == "it has an attention mask" and not report.layers[0].removed


def test_layers_whose_processors_cannot_be_wrapped_are_left_alone_and_reported():
    class WithArguments(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, strength=1.0):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    unet = make_unet()
    inputs = (torch.randn(2, 4, 16, 16), 500, torch.randn(2, 7, 16))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    unet.get_submodule(name).set_processor(WithArguments())
    report = apply_token_merging(unet, ratio=0.5)
    unet(*inputs)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert report.merged and "arguments of its own (strength)" in reasons[name]
    assert type(unet.get_submodule(name).processor) is WithArguments


def test_chunked_feed_forward_is_not_lengthened():
    """Chunks as long as a merged sequence must not be taken for one."""
    unet = make_unet()
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 16)
    for block in [*unet.down_blocks[0].modules(), *unet.up_blocks[1].modules()]:  # where there are 256 tokens
        if isinstance(block, BasicTransformerBlock):
            block.set_chunk_feed_forward(128, dim=1)
    report = apply_token_merging(unet, ratio=0.5, merge_mlp=True, max_downsample=1)
    assert unet(sample, 500, text).sample.shape == sample.shape and report.merged


def test_one_controlnet_used_twice_is_wrapped_once():
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

    pipe = make_pipeline("controlnet")
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, pipe.controlnet])
    apply_token_merging(pipe, ratio=0.5)
    processors = [
        m.processor for m in pipe.controlnet.modules() if isinstance(getattr(m, "processor", None), ToMeProcessor)
    ]
    assert processors and not any(isinstance(p.inner, ToMeProcessor) for p in processors)


def test_removing_after_the_processors_were_replaced(pipe):
    apply_token_merging(pipe, ratio=0.5)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    remove_token_merging(pipe)
    assert not hooks(pipe)


def test_processors_that_the_host_makes_anew_keep_the_configuration(pipe):
    """As loading an IP-Adapter does: ``cls()`` for every self-attention layer."""
    report = apply_token_merging(pipe, ratio=0.25)
    first = generate(pipe)
    for module in pipe.unet.modules():
        if isinstance(getattr(module, "processor", None), ToMeProcessor):
            module.set_processor(type(module.processor)())
    assert torch.equal(generate(pipe), first) and report.removed[1] == 0.25
    assert len(report.steps) == 4
