"""Models that are changed while merging is attached to them."""

import warnings

import torch
from conftest import generate, hooks, make_pipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from tomesd_plus import (
    StepsSchedule,
    ToMeProcessor,
    apply_feature_cache,
    apply_token_merging,
    remove_token_merging,
)


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


def test_a_compiled_model_is_freed_of_its_hooks_at_once(pipe):
    unet = pipe.unet
    apply_token_merging(pipe, ratio=0.5)
    pipe.unet = torch.compile(unet, backend="eager")
    remove_token_merging(pipe)
    assert not unet._forward_pre_hooks and not unet._forward_hooks


def test_processors_merge_again_after_a_temporary_replacement(pipe):
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
