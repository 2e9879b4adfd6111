"""The benchmark's shapes, ideals and settings."""

from collections import Counter

import pytest
import torch
from conftest import INPUTS, hooks, make_pipeline, make_unet
from diffusers.models.attention import BasicTransformerBlock

from tomesd_plus import FeatureCacheReport, ToMeConfig
from tomesd_plus.benchmark import (
    SHAPES,
    Workload,
    build_unet,
    fewer_tokens,
    make_inputs,
    settings_from,
    with_ideals,
)
from tomesd_plus.benchmark.measure import _candidate, twin
from tomesd_plus.caching.cache import feature_cache_on
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.merging.attachment import attachments_on

CPU = torch.device("cpu")
TINY = Workload("tiny", 64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of the gate


# Shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions", "attention"),
    [
        ("sd15", 859.5, {1: 5, 2: 5, 4: 5, 8: 1}),
        ("sd21", 865.9, {1: 5, 2: 5, 4: 5, 8: 1}),
        ("sdxl", 2567.5, {2: 10, 4: 60}),
    ],
)
def test_shapes_are_the_published_ones(name, millions, attention):
    shape = SHAPES[name]
    unet = build_unet(shape, torch.float16, "meta")
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == millions
    assert {p.dtype for p in unet.parameters()} == {torch.float16}
    counts, size = Counter(), 128
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.register_forward_pre_hook(lambda m, args: counts.update([size // 8 / args[0].shape[1] ** 0.5]))
    inputs = make_inputs(shape, size, 2, torch.float16, "meta")
    assert unet(timestep=torch.zeros((), device="meta"), **inputs).sample.shape == inputs["sample"].shape
    assert counts == attention
    assert shape.finest == min(attention)


def test_the_same_weights_every_time_and_no_trace_in_the_global_state():
    before = torch.get_rng_state()
    one, two = build_unet(SHAPES["tiny"]), build_unet(SHAPES["tiny"], torch.bfloat16)
    assert torch.equal(before, torch.get_rng_state()) and torch.get_default_dtype() is torch.float32
    assert {p.dtype for p in two.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), build_unet(SHAPES["tiny"]).parameters()))


def test_twins_share_their_tensors_only():
    unet = build_unet(SHAPES["tiny"])
    other = twin(unet)
    assert all(a is b for a, b in zip(unet.parameters(), other.parameters()))
    assert not set(unet.modules()) & set(other.modules())


# The ideal --------------------------------------------------------------------------------------------------------


def tokens_seen(unet):
    """Tokens at the layers of the first block, which has 256 of them."""
    block, seen = unet.down_blocks[0].attentions[0].transformer_blocks[0], {}
    layers = {
        "query": block.attn1.to_q,
        "key": block.attn1.to_k,
        "cross": block.attn2.to_q,
        "mlp": block.ff.net[0].proj,
    }
    handles = [
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].shape[1]}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        output = unet(**INPUTS, timestep=500).sample
    for handle in handles:
        handle.remove()
    return seen, output


@pytest.mark.parametrize(
    ("options", "merged"),
    [
        ({}, {"query", "key"}),
        ({"layers": ["self_attention", "mlp"]}, {"query", "key", "mlp"}),
        ({"layers": ["self_attention", "cross_attention", "mlp"]}, {"query", "key", "cross", "mlp"}),
        ({"layers": "block"}, {"query", "key", "cross", "mlp"}),
        ({"sides": "keys_values"}, {"key"}),
        ({"sides": "queries"}, {"query"}),
        ({"layers": ["mlp"]}, {"mlp"}),
    ],
)
@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_the_ideal_runs_the_merged_layers_on_fewer_tokens_and_leaves_nothing(options, merged, ratio):
    unet = make_unet()
    whole, expected = tokens_seen(unet)
    with fewer_tokens(unet, ToMeConfig(ratio=ratio, **options), 16, 16):
        fewer, output = tokens_seen(unet)
    assert set(whole.values()) == {256}
    assert fewer == {name: int(256 * (1 - ratio)) if name in merged else 256 for name in whole}
    assert output.shape == expected.shape and not torch.equal(output, expected)
    assert not [m for m in unet.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert torch.equal(tokens_seen(unet)[1], expected)


def test_ideals_are_of_the_same_layers_and_ratio():
    settings = with_ideals(settings_from(["attn1", "tomesd", "block, full every 4", "cache 3"], [0.5]))
    names = ["untouched", "ideal: attn1", "attn1", "tomesd", "ideal: block", "block, full every 4", "cache 3"]
    assert [setting.name for setting in settings] == names
    assert {setting.ratio for setting in settings} == {None, 0.5}
    assert settings_from(["block + cache 3"], [0.5])[0].ideal is None


# Settings ---------------------------------------------------------------------------------------------------------


def test_the_finest_level_of_a_shape_is_the_first_that_is_merged():
    pipe = make_pipeline("sdxl")
    for levels, expected in ((1, 2), (2, 4)):
        with settings_from(["attn1"], [0.5], levels)[0].switched_on(pipe, finest=2):
            assert attachments_on(pipe.unet)[0].config.max_downsample == expected
    assert not hooks(pipe)


def test_settings_of_ones_own():
    (one,) = settings_from(["merge: {ratio: 0.25, window: 4, full_steps: 2}, cache: 3"], [0.5])
    assert (one.ratio, one.cycle) == (0.25, 6)
    [forecast] = settings_from(["cache: {interval: 3, forecast: 1.0}"], [0.5])
    assert forecast.cycle == 25  # the first steps have no trend to follow
    with one.switched_on(pipe := make_pipeline("sd")):
        config = attachments_on(pipe.unet)[0].config
    assert (config.window, config.schedules[1](0.9), config.schedules[1](0.1)) == (4, 0.25, 0.25)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("attn2", "unknown setting 'attn2'"),
        ("merge: {schedule: cosine}", "constant ratio"),
        ("merge: {max_downsample: 2}", "--levels"),
        ("cache: {threshold: 0.1}", "interval"),
        ("merge: {windows: 3}", "windows"),
    ],
)
def test_settings_that_cannot_be(name, words):
    with pytest.raises(EvaluationError, match=words):
        for setting in settings_from([name], [0.5]):
            setting.check()


@pytest.mark.parametrize(
    ("name", "full"), [("cache 3", [True, False, False]), ("block + cache 3", [True, False, False])]
)
@torch.no_grad()
def test_each_run_begins_a_generation(name, full):
    (setting,) = settings_from([name], [0.5])
    with _candidate(build_unet(SHAPES["tiny"]), setting, TINY, CPU) as candidate:
        for _ in range(2):
            candidate.run(setting.cycle)
            assert [step.full for step in FeatureCacheReport(feature_cache_on(candidate.pipe.unet)).steps] == full
