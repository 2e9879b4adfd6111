"""Attention reuse: a layer's output of the last whole step again."""

import copy
from itertools import pairwise

import torch
from conftest import INPUTS, generate
from diffusers.models.attention_processor import AttnProcessor2_0

from tomesd_plus import StepsSchedule, apply_token_merging, remove_token_merging


def test_reused_attention_is_that_of_the_last_whole_step(pipe):
    unet = pipe.unet
    outputs = []
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.register_forward_hook(lambda layer, args, output: outputs.append(output.clone()))
    report = apply_token_merging(pipe, ratio=0.5, whole_every=2, reuse_attention=True)
    picture = generate(pipe, num_inference_steps=4)
    assert [torch.equal(a, b) for a, b in pairwise(outputs)] == [True, False, True]
    assert not any(step.removed for step in report.steps)
    assert torch.equal(generate(pipe, num_inference_steps=4), picture)
    remove_token_merging(pipe)
    assert not torch.equal(generate(pipe, num_inference_steps=4), picture)


def test_attention_is_not_reused_where_the_ratio_is_nought(pipe):
    plain = generate(pipe, num_inference_steps=4)
    apply_token_merging(pipe, ratio=StepsSchedule((0, 0)), whole_every=2, reuse_attention=True)
    assert torch.equal(generate(pipe, num_inference_steps=4), plain)


@torch.no_grad()
def test_reuse_starts_anew_with_another_batch_and_size(pipe):
    unet, plain = pipe.unet, copy.deepcopy(pipe.unet)
    report = apply_token_merging(unet, ratio=0.5, whole_every=4, reuse_attention=True)
    sample, text = INPUTS["sample"], INPUTS["encoder_hidden_states"]
    timesteps = torch.tensor([900, 890, 880, 870, 860, 850])
    shapes = [sample, sample, sample[:1], sample[:1], sample[:1, :, :8].repeat(1, 1, 1, 2), sample[:1, :, :8]]
    untouched = []
    for timestep, latents in zip(timesteps, shapes, strict=True):
        arguments = latents, timestep, text[: len(latents)]
        untouched.append(torch.equal(unet(*arguments).sample, plain(*arguments).sample))
    assert untouched == [True, False, True, False, True, True]
    assert all(layer.reason for layer in report.layers)


def test_reuse_comes_back_with_the_processors(pipe):
    unet = pipe.unet
    apply_token_merging(pipe, ratio=0.5, whole_every=2, reuse_attention=True)
    picture, processors = generate(pipe, num_inference_steps=4), unet.attn_processors
    unet.set_attn_processor(AttnProcessor2_0())
    generate(pipe, num_inference_steps=2)
    unet.set_attn_processor(processors)
    generate(pipe, num_inference_steps=2)
    assert torch.equal(generate(pipe, num_inference_steps=4), picture)
