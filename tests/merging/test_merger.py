"""What the layers of one model share: gradients, layers left alone, models changed under the attachment's feet."""

import warnings

import pytest
import torch
from conftest import INPUTS, generate, hooks, make_pipeline, make_unet
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

from tomesd_plus import (
    CosineSchedule,
    StepsSchedule,
    ToMeProcessor,
    apply_feature_cache,
    apply_token_merging,
    remove_token_merging,
)
from tomesd_plus.merging.attachment import attachments_on


def test_gradients_in_training_mode():
    unet = make_unet().train()
    report = apply_token_merging(unet, ratio=0.5, layers=["self_attention", "mlp"])
    unet(torch.randn(2, 4, 16, 16), 500, torch.randn(2, 7, 16)).sample.square().mean().backward()
    assert report.merged
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "keys", "layers": ["self_attention", "mlp"]},
        {"layers": "block"},
        {"full_steps": 2},
        {"window": None},
    ],
)
def test_only_a_generations_first_step_reads_from_the_device(options):
    """What would make the host wait for a GPU: a number's value, or how many entries are not zero."""
    unet = make_unet()
    report = apply_token_merging(unet, ratio=CosineSchedule(0.6, 0.3), **options)
    timesteps = torch.tensor([900, 700, 500, 300])
    with torch.no_grad():
        unet(**INPUTS, timestep=timesteps[0])
        with NoReading():
            for timestep in timesteps[1:]:
                unet(**INPUTS, timestep=timestep)
        assert report.merged
        with pytest.raises(AssertionError), NoReading():
            timesteps[1].item()


class NoReading(TorchDispatchMode):
    """Fails where a value is read from a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return function(*args, **(kwargs or {}))


def test_gradient_checkpointing_runs_the_same_plans_again():
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet().train()
        report = apply_token_merging(unet, ratio=0.5, layers=["self_attention", "mlp"])
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
    assert str(report.layers[0].reason) == "it has an attention mask" and not report.layers[0].removed


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
    reasons = {layer.name: str(layer.reason) for layer in report.layers}
    assert report.merged and "arguments of its own (strength)" in reasons[name]
    assert type(unet.get_submodule(name).processor) is WithArguments


def test_chunked_feed_forward_is_not_lengthened():
    """Chunks as long as a merged sequence must not be taken for one."""
    unet = make_unet()
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 16)
    for block in [*unet.down_blocks[0].modules(), *unet.up_blocks[1].modules()]:  # where there are 256 tokens
        if isinstance(block, BasicTransformerBlock):
            block.set_chunk_feed_forward(128, dim=1)
    report = apply_token_merging(unet, ratio=0.5, layers=["self_attention", "mlp"], max_downsample=1)
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


def test_an_error_in_the_middle_of_a_call_leaves_nothing_running():
    unet = make_unet()
    apply_token_merging(unet, ratio=0.5, layers="block")
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    x, text = torch.randn(2, 256, 16), torch.randn(2, 7, 16)
    failing = block.ff.register_forward_pre_hook(lambda layer, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unet(torch.randn(2, 4, 16, 16), 500, text)
    failing.remove()
    (attachment,) = attachments_on(unet)
    current = attachment.decider.current
    assert not current.call.running and current.block.entered is None  # no activation is held
    with torch.no_grad():
        by_itself = block(x, encoder_hidden_states=text)
        remove_token_merging(unet)
        assert torch.equal(by_itself, block(x, encoder_hidden_states=text))


def test_whole_blocks_are_left_alone_where_places_matter_with_checkpointing_too():
    for checkpointing in (False, True):
        unet = make_unet(attention_type="gated").train(checkpointing)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        report = apply_token_merging(unet, ratio=0.5, layers="block")
        gligen = {
            "boxes": torch.rand(2, 3, 4),
            "positive_embeddings": torch.randn(2, 3, 16),
            "masks": torch.ones(2, 3),
        }
        unet(torch.randn(2, 4, 16, 16), 500, torch.randn(2, 7, 16), cross_attention_kwargs={"gligen": gligen})
        assert not report.merged and "it looks at places in the picture" in str(report)


def test_a_compiled_model_is_freed_of_its_hooks_at_once(pipe):
    unet = pipe.unet
    apply_token_merging(pipe, ratio=0.5)
    pipe.unet = torch.compile(unet, backend="eager")
    remove_token_merging(pipe)
    assert not unet._forward_pre_hooks and not unet._forward_hooks


@pytest.mark.parametrize("options", [{"sides": "keys_values"}, {"sides": "queries"}])
def test_fused_projections_are_left_alone_where_queries_and_keys_differ(options):
    unet = make_unet()
    unet.fuse_qkv_projections()
    inputs = (torch.randn(2, 4, 16, 16), 500, torch.randn(2, 7, 16))
    plain = unet(*inputs).sample
    report = apply_token_merging(unet, ratio=0.5, **options)
    with pytest.warns(UserWarning, match="fused"):
        assert torch.equal(unet(*inputs).sample, plain)
    assert "its projections are fused" in str(report)


def test_processors_that_come_back_after_a_detour_merge_again(pipe):
    report = apply_token_merging(pipe, ratio=0.5)
    merged = generate(pipe)
    ours = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    plain = generate(pipe)
    assert not torch.equal(plain, merged)
    pipe.unet.set_attn_processor(dict(ours))
    generate(pipe)  # found again in its first call
    assert torch.equal(generate(pipe), merged) and report.merged


def test_no_warning_for_a_step_that_ran_no_layer_of_the_level():
    pipe = make_pipeline("sdxl")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        apply_feature_cache(pipe, interval=2)
        report = apply_token_merging(pipe, ratio={2: StepsSchedule((0.0, 0.5))})
        generate(pipe, num_inference_steps=10)
    assert report.merged


def test_each_of_several_calls_a_step_keeps_its_own_plans_and_details():
    """Guidance branch by branch: the second branch gets nothing of the first."""
    timesteps = torch.tensor([900, 800, 700])
    samples = [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    text = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(2))
    together, alone = [], []
    with torch.no_grad():
        for outputs, branches in ((together, [(0, 1)]), (alone, [(0,), (1,)])):
            for chosen in branches:
                unet = make_unet()
                apply_token_merging(unet, ratio=0.5, plan_every=3, full_steps=3, destinations="fixed")
                outputs += [unet(samples[i], t, text).sample for t in timesteps for i in chosen]
    assert all(torch.equal(together[2 * k + i], alone[3 * i + k]) for k in range(3) for i in (0, 1))
