"""The benchmark of transformers: published shapes, ideals that run on as few tokens, a table without times."""

from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from typer.testing import CliRunner

from tomesd_plus import ToMeConfig, apply_token_merging, remove_token_merging
from tomesd_plus.benchmark import (
    SHAPES,
    Protocol,
    Workload,
    build_unet,
    make_inputs,
    measure,
    settings_from,
    with_ideals,
)
from tomesd_plus.benchmark.ideal_transformers import fewer_image_tokens
from tomesd_plus.benchmark.rows import load_rows
from tomesd_plus.benchmark.shapes import call_model
from tomesd_plus.cli import app
from tomesd_plus.host.transformers import blocks_of

CPU = torch.device("cpu")
SMALL = {
    "pixart": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "cross_attention_dim": 16},
    "sd3": {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "caption_projection_dim": 16,
        "dual_attention_layers": (0,),
    },
    "flux-blocks": {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
}  # fmt: skip
LAYERS = ["self_attention", "cross_attention", "mlp"]


@pytest.fixture(params=SMALL)
def shape(request, monkeypatch):
    small = replace(SHAPES[request.param], config=SHAPES[request.param].config | SMALL[request.param])
    monkeypatch.setitem(SHAPES, "small", small)
    return small


@pytest.mark.parametrize(
    ("name", "millions", "kind"),
    [
        ("pixart", 610.9, PixArtTransformer2DModel),
        ("sd3", 2028.3, SD3Transformer2DModel),
        ("flux-blocks", 687.1, FluxTransformer2DModel),
    ],
)
def test_shapes_are_the_published_ones_and_have_4096_tokens(name, millions, kind):
    model = build_unet(SHAPES[name], torch.float16, "meta")
    assert isinstance(model, kind)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert SHAPES[name].grid(SHAPES[name].image_size) == (64, 64)


def tokens_seen(model, shape):
    """The longest sequence that each linear layer of the blocks was given, by its name, and the output."""
    seen, handles = {}, []
    for name, layer in (
        (f"{b}.{n}", each) for b, block in blocks_of(model).items() for n, each in block.named_modules()
    ):
        if isinstance(layer, torch.nn.Linear):
            handles.append(
                layer.register_forward_pre_hook(
                    lambda m, args, name=name: seen.update({name: args[0].shape[1]}) if args[0].ndim == 3 else None
                )
            )
    with torch.no_grad():
        [output] = call_model(model, shape, make_inputs(shape, 128, 1, torch.float32, CPU), torch.tensor(500.0))
    for handle in handles:
        handle.remove()
    return seen, output


@pytest.mark.parametrize(
    "options",
    [{}, {"layers": LAYERS}, {"layers": "block"}, {"layers": "block", "blocks_per_run": "all"}],
    ids=lambda options: "-".join(map(str, options.values())) or "attention",
)
def test_the_ideal_runs_every_layer_on_as_many_tokens_as_merging_does(shape, options):
    model = build_unet(shape)
    if "PixArt" not in type(model).__name__ and options.get("layers") == LAYERS:
        options = {"layers": ["self_attention", "mlp"]}  # attention is joint
    whole, plain = tokens_seen(model, shape)
    config = ToMeConfig(ratio=0.5, **options)
    with fewer_image_tokens(model, config, 8, 8):
        ideal, output = tokens_seen(model, shape)
    assert output.shape == plain.shape and torch.equal(tokens_seen(model, shape)[1], plain)
    apply_token_merging(model, config)
    merged, _ = tokens_seen(model, shape)
    remove_token_merging(model)
    assert ideal == merged and ideal != whole


def test_there_is_no_ideal_of_one_side(shape):
    with (
        pytest.raises(ValueError, match="no ideal"),
        fewer_image_tokens(build_unet(shape), ToMeConfig(sides="queries"), 8, 8),
    ):
        pass


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_settings_are_measured_beside_their_ideals(shape, compiled):
    names = ["attn1", "attn1 + attn2 + mlp", "block", "run"]
    settings = settings_from(names, [0.5]) if compiled else with_ideals(settings_from(names, [0.5]))
    settings = [with_ideals([])[0], *(each for each in settings if each.switches)]
    workload = Workload("small", 64, compiled=compiled)
    measured = measure(workload, settings, CPU, Protocol(repeats=1, run_seconds=0))
    assert [each.setting for each in measured] == settings
    for each in measured:
        assert not each.failure and len(each.seconds) == 1
        ours = "merge" in each.setting.switches
        assert [(each.matching_seconds or 0) > 0, (each.merging_seconds or 0) > 0] == [ours, ours]


def test_keys_and_values_without_an_ideal_are_a_row_with_a_reason(shape):
    settings = with_ideals(settings_from(["keys and values", "cache 3"], [0.5]))
    measured = {each.setting.name: each for each in measure(Workload("small", 64), settings, CPU, Protocol(1, 0))}
    assert "no ideal" in measured["ideal: keys and values"].failure
    assert measured["keys and values"].seconds and not measured["keys and values"].failure


def test_the_command_measures_a_transformer(monkeypatch, tmp_path):
    small = replace(SHAPES["flux-blocks"], config=SHAPES["flux-blocks"].config | SMALL["flux-blocks"])
    monkeypatch.setitem(SHAPES, "flux-blocks", small)
    monkeypatch.chdir(tmp_path)
    options = ["--shape", "flux-blocks", "--size", "64", "--batch", "1", "--repeats", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, ["benchmark", *options])
    assert result.exit_code == 0, result.output
    rows = {row.setting: row for row in load_rows(tmp_path / "benchmark" / "benchmark.csv")}
    assert {"untouched", "attn1", "attn1 + attn2 + mlp", "block", "run"} < rows.keys() and len(rows) == 9
    assert all(row.step_ms and row.speedup and not row.psnr and not row.note for row in rows.values())
    result = CliRunner().invoke(app, ["benchmark", "--shape", "sd3", "--size", "72"])
    assert result.exit_code == 2 and "multiples of 16" in result.output
