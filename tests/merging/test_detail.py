"""Detail-keeping unmerge: whole steps, and what the steps between make of them."""

import copy
import pickle

import pytest
import torch
from conftest import INPUTS, OneLayer, attention_layer, begin_call, generate, make_unet, merge_in, plans_of

from tomesd_plus import apply_token_merging, remove_token_merging

TIMESTEPS = torch.tensor([900, 880, 860, 840, 820])


@torch.no_grad()
def outputs(unet, timesteps=TIMESTEPS, batches=None, drift=0.02):
    """The UNet's outputs for inputs that change a little from step to step."""
    generator = torch.Generator().manual_seed(5)
    result, sample = [], INPUTS["sample"]
    for timestep, batch in zip(timesteps, batches or [2] * len(timesteps)):
        sample = sample + drift * torch.randn(sample.shape, generator=generator)
        text = INPUTS["encoder_hidden_states"][:batch]
        result.append(unet(sample[:batch], timestep, text).sample)
    return result


def test_the_formula():
    attn, x = attention_layer()
    layer = OneLayer(attn)
    later = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        kept = layer(x)  # untouched
        attachment = merge_in(layer, ratio=0.5, full_steps=2, destinations="fixed")
        assert torch.equal(layer(x), kept)
        begin_call(attachment, timestep=900)
        result = layer(later)
        plan = next(iter(plans_of(attachment).values()))
        plain_layer = OneLayer(attention_layer()[0])
        plain = merge_in(plain_layer, ratio=0.5, destinations="fixed")
        begin_call(plain, timestep=900)
        copied = plain_layer(later)
    expected = copied + kept - plan.unmerge(plan.merge(kept))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert (result - copied).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": ["mlp"]},
        {"layers": ["cross_attention"]},
        {"layers": "block"},
        {"sides": "queries"},
        {"mode": "prune"},
    ],
)
def test_whole_steps_are_untouched_and_the_others_are_closer_than_without(options):
    plain = outputs(make_unet())
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, full_steps=3, **options)
    kept = outputs(unet)
    assert [torch.equal(a, b) for a, b in zip(kept, plain)] == [True, False, False, True, False]
    assert [bool(step.removed) for step in report.steps] == [False, True, True, False, True]
    unet = make_unet()
    apply_token_merging(unet, ratio=0.5, **options)
    copied = outputs(unet)
    for index in (1, 2, 4):
        error, other = ((r[index] - plain[index]).square().mean() for r in (kept, copied))
        assert error < other / 2


def test_a_generation_a_batch_and_a_size_begin_with_a_whole_step():
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, full_steps=3)
    outputs(unet)
    outputs(unet, TIMESTEPS.clone())  # a new generation, in the middle of the cadence
    assert [bool(step.removed) for step in report.steps] == [False, True, True, False, True]
    outputs(unet, TIMESTEPS.clone(), batches=[2, 2, 1, 1, 1])  # guidance switched off
    assert [bool(step.removed) for step in report.steps] == [False, True, False, True, True]
    assert report.kept_bytes > 0
    remove_token_merging(unet)
    assert report.kept_bytes == 0


def test_calls_at_one_noise_level_are_one_step():
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, full_steps=2)
    outputs(unet, torch.tensor([900, 800, 800, 700, 700, 600]))
    assert [bool(step.removed) for step in report.steps] == [False, True, True, False, False, True]


def test_only_layers_that_are_merged_are_kept():
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, full_steps=2, layers=["self_attention", "mlp"], max_downsample=1)
    outputs(unet, TIMESTEPS[:1])
    one = 2 * 256 * 16 * 4  # bytes of an output at the first level
    assert report.kept_bytes == 2 * 3 * one  # attention and MLP of its three blocks


def test_the_same_call_gives_the_same_picture_and_copies_do_too(pipe):
    apply_token_merging(pipe, ratio=0.5, full_steps=2)
    first = generate(pipe, num_inference_steps=5)
    twin, pickled = copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe.unet))
    assert torch.equal(generate(pipe, num_inference_steps=5), first)
    assert torch.equal(generate(twin, num_inference_steps=5), first)
    pipe.unet = pickled
    assert torch.equal(generate(pipe, num_inference_steps=5), first)
