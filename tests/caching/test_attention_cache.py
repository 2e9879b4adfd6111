"""A cache whose cached steps run everything but self-attention, whose last outputs they take again."""

import copy
from itertools import pairwise

import pytest
import torch
from conftest import INPUTS, generate, make_pipeline

from tomesd_plus import apply_feature_cache, apply_token_merging


def test_reused_attention_is_that_of_the_last_full_step(pipe):
    outputs = []
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.register_forward_hook(lambda layer, args, output: outputs.append(output.clone()))
    report = apply_feature_cache(pipe, interval=2, branch="self_attention")
    generate(pipe)
    assert [torch.equal(a, b) for a, b in pairwise(outputs)] == [True, False, True]
    assert [step.full for step in report.steps] == [True, False, True, False]


@pytest.mark.parametrize(("kind", "level"), [("sd", 0), ("sdxl", 1)])
def test_it_is_the_finest_level_whose_attention_is_skipped(kind, level):
    report = apply_feature_cache(make_pipeline(kind), branch="self_attention")
    last = {f"down_blocks.{level}", f"up_blocks.{1 - level}"} | ({"mid_block"} if level else set())
    assert {name.partition(".attentions")[0] for name in report.skipped_layers} == last
    assert all(name.endswith("attn1") for name in report.skipped_layers)


@torch.no_grad()
def test_reuse_starts_anew_with_another_batch_and_size(pipe):
    unet, plain = pipe.unet, copy.deepcopy(pipe.unet)
    apply_feature_cache(unet, interval=4, branch="self_attention")
    sample, text = INPUTS["sample"], INPUTS["encoder_hidden_states"]
    timesteps = torch.tensor([900, 890, 880, 870, 860, 850])
    shapes = [sample, sample, sample[:1], sample[:1], sample[:1, :, :8].repeat(1, 1, 1, 2), sample[:1, :, :8]]
    untouched = []
    for timestep, latents in zip(timesteps, shapes, strict=True):
        arguments = latents, timestep, text[: len(latents)]
        untouched.append(torch.equal(unet(*arguments).sample, plain(*arguments).sample))
    assert untouched == [True, False, True, False, True, True]


def test_a_forecast_follows_each_layers_trend_and_keeps_twice_as_much(pipe):
    kept = {}
    for forecast in (0.0, 1.0):
        twin = copy.deepcopy(pipe)
        report = apply_feature_cache(twin, interval=2, branch="self_attention", forecast=forecast)
        picture = generate(twin, num_inference_steps=6)
        kept[forecast] = report.kept_bytes, picture, len(report.skipped_layers)
    one = 2 * 256 * 16 * 4  # bytes of an output at the first level
    assert kept[0.0][0] == kept[0.0][2] * one and kept[1.0][0] == 2 * kept[0.0][0]
    assert not torch.equal(kept[0.0][1], kept[1.0][1])


def test_what_runs_on_its_full_steps_can_be_merged(pipe):
    report = apply_token_merging(pipe, ratio=0.5)
    apply_feature_cache(pipe, interval=2, branch="self_attention")
    picture = generate(pipe)
    assert [step.removed.get(1) for step in report.steps] == [0.5, None, 0.5, None]
    assert torch.equal(generate(pipe), picture)
