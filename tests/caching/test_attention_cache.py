"""A cache whose cached steps run everything but self-attention, whose last outputs they take again."""

import copy
from itertools import pairwise

import pytest
import torch
from conftest import INPUTS, generate, make_pipeline, make_unet

from tomesd_plus import apply_feature_cache, apply_token_merging, remove_feature_cache


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


@pytest.mark.parametrize("ratio", [0.5, None])
@pytest.mark.parametrize("first", ["cache", "merging"])
def test_blocks_whose_attention_is_taken_again_are_not_merged_as_a_whole(pipe, ratio, first):
    """Their attention's kept output is of another plan's tokens."""
    switches = {
        "cache": lambda: apply_feature_cache(pipe, interval=2, branch="self_attention"),
        "merging": lambda: apply_token_merging(pipe, ratio=ratio, layers="block", max_downsample=2),
    }
    cached = copy.deepcopy(pipe)
    apply_feature_cache(cached, interval=2, branch="self_attention")
    reports = {name: switches[name]() for name in sorted(switches, key=lambda name: name != first)}
    assert not torch.equal(generate(pipe), generate(cached))
    reasons = {layer.downsample: layer.reason for layer in reports["merging"].layers}
    assert "takes its self-attention's outputs again" in reasons[1] and reasons[2] is None


def test_it_is_refused_where_it_cannot_be(pipe):
    unet = make_unet().train()
    unet.enable_gradient_checkpointing()
    apply_feature_cache(unet, branch="self_attention")
    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        unet(**INPUTS, timestep=900)
    with torch.no_grad():
        unet(**INPUTS, timestep=900)
    plain = make_unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)
    with pytest.raises(TypeError, match="transformer blocks"):
        apply_feature_cache(plain, branch="self_attention")


def test_a_compiled_unets_attention_is_skipped_too(pipe):
    apply_feature_cache(pipe, interval=2, branch="self_attention")
    expected = generate(pipe)
    remove_feature_cache(pipe)
    torch.compiler.reset()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    report = apply_feature_cache(pipe, interval=2, branch="self_attention")
    torch.testing.assert_close(generate(pipe), expected, atol=1e-4, rtol=1e-4)
    assert report.skipped_layers and report.cached == 2
    remove_feature_cache(pipe)


def test_the_gate_does_not_judge_a_block_without_its_attention(pipe, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    apply_feature_cache(pipe, interval=2, branch="self_attention")
    apply_token_merging(pipe, ratio=0.5, gate="on")
    generate(pipe)
    assert not list(tmp_path.rglob("gate.json"))
