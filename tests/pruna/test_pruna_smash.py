"""Smashing with tome_sd and tome_cache: the same bits as by this package's own functions, before and after saving."""

import copy
import logging
from pathlib import Path

import pruna_tools
import pytest
import torch
from conftest import generate, make_pipeline
from pruna import SmashConfig, smash
from pruna.logging.logger import pruna_logger
from pruna_tools import saved_and_loaded, smashed

from tomesd_plus import (
    FeatureCacheConfig,
    Preset,
    StepPlan,
    ToMeConfig,
    apply_feature_cache,
    apply_preset,
    apply_token_merging,
    load_tiny_pipeline,
    merging_report,
    remove_token_merging,
)
from tomesd_plus.schedules import AdaptiveRatio
from tomesd_plus.schedules.named import schedule_by_name

OWN = {  # hyperparameters, and what they are in this package's words
    "default": ({}, {}),
    "ratio": ({"reduction_ratio": 0.3}, {"ratio": schedule_by_name("cosine", 0.3)}),
    "schedule": ({"schedule": "linear"}, {"ratio": schedule_by_name("linear", 0.5)}),
    "constant": ({"schedule": "constant", "reduction_ratio": 0.75}, {"ratio": 0.75}),
    "method": ({"method": "prune"}, {"mode": "prune"}),
    "levels": ({"max_downsample": 2}, {"max_downsample": 2}),
    "layer": ({"layers": "mlp"}, {"layers": ("mlp",)}),
    "layers": ({"layers": ["mlp", "self_attention"]}, {"layers": ("self_attention", "mlp")}),
    "block": ({"layers": "block"}, {"layers": "block"}),
    "adaptive": (
        {"adaptive": True, "similarity": 0.2, "reduction_ratio": 0.75},
        {"ratio": AdaptiveRatio(0.2, (0, 0.25, 0.5, 0.75))},
    ),
}
TUNED = Preset(
    "tuned",
    ToMeConfig(ratio=0.5, full_steps="cache"),
    FeatureCacheConfig(plan=StepPlan("FFSC")),
    steps=4,
)


@pytest.mark.parametrize("name", OWN)
def test_tome_sd_is_token_merging(name, tmp_path):
    hyperparameters, options = OWN[name]
    expected = make_pipeline("sd")
    apply_token_merging(expected, **options)
    pipe = smashed(make_pipeline("sd"), {"tome_sd": hyperparameters})
    picture = generate(pipe)
    assert merging_report(pipe).removed[1] > 0.1
    assert torch.equal(picture, generate(expected)) and torch.equal(picture, generate(pipe))
    assert not torch.equal(picture, generate(make_pipeline("sd")))
    loaded = saved_and_loaded(make_pipeline("sd"), {"tome_sd": hyperparameters}, tmp_path)
    assert torch.equal(picture, generate(loaded)) and merging_report(loaded).removed[1] > 0.1


def test_a_gate_measures(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pipe = smashed(make_pipeline("sd"), {"tome_sd": {"gate": True}})
    generate(pipe)
    assert (tmp_path / "tomesd_plus" / "gate.json").is_file()  # what it measured


@pytest.mark.parametrize(
    "hyperparameters, config",
    [
        ({}, FeatureCacheConfig(3, forecast=0.85)),
        ({"interval": 2, "forecast": 1.0}, FeatureCacheConfig(2, forecast=1.0)),
        ({"interval": 2, "skip": "calls"}, FeatureCacheConfig(2, branch="nothing")),
    ],
)
def test_tome_cache_is_a_feature_cache(hyperparameters, config, tmp_path):
    expected = make_pipeline("sd")
    apply_feature_cache(expected, config)
    pipe = smashed(make_pipeline("sd"), {"tome_cache": hyperparameters})
    picture = generate(pipe)
    assert torch.equal(picture, generate(expected)) and torch.equal(picture, generate(pipe))
    assert not torch.equal(picture, generate(make_pipeline("sd")))
    loaded = saved_and_loaded(make_pipeline("sd"), {"tome_cache": hyperparameters}, tmp_path)
    assert torch.equal(picture, generate(loaded))


@pytest.mark.parametrize("given", ["name", "preset", "path", "text path", "content"])
def test_a_preset_is_saved_with_the_model(given, tmp_path):
    file = tmp_path / "tuned.json"
    TUNED.save(file)
    preset = "fast" if given == "name" else TUNED
    chosen = {"name": "fast", "preset": TUNED, "path": file, "text path": str(file)}.get(given)
    if given == "content":
        other = SmashConfig({"tome_cache": {"preset": file}}, device="cpu")
        chosen = other["tome_cache_preset"]
        assert chosen["preset"]["description"] == "tuned"
    expected = make_pipeline("sd")
    apply_preset(expected, preset, force=True)
    configured = SmashConfig({"tome_cache": {"preset": chosen, "force": given == "name"}}, device="cpu")
    file.unlink()  # it is not needed any more
    model = smash(make_pipeline("sd"), configured)
    picture = generate(model.model)
    assert torch.equal(picture, generate(expected)) and merging_report(model.model).removed[1] > 0
    model.save_pretrained(tmp_path / "saved")
    loaded = pruna_tools.PrunaModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(picture, generate(loaded.model))
    if given != "name":
        assert loaded.smash_config["tome_cache_preset"]["preset"]["description"] == "tuned"


def test_a_preset_by_name_is_refused_at_few_steps(tmp_path):
    """As by ``apply_preset``, and after loading too; ``force`` keeps it, which the test above has."""
    model = smash(make_pipeline("sd"), SmashConfig({"tome_cache": {"preset": "fast"}}, device="cpu"))
    model.save_pretrained(tmp_path)
    loaded = pruna_tools.PrunaModel.from_pretrained(tmp_path)
    for pipe in (model.model, loaded.model):
        with pytest.raises(ValueError, match="the preset 'fast' is for 9 steps and more: with 4 "):
            generate(pipe, num_inference_steps=4)


def test_warnings_go_to_the_log(tmp_path):
    """Pruna hides warnings: that a preset is for another scheduler is told when it is smashed, and when loaded."""
    tuned = Path(__file__).parents[2] / "results" / "front-euler-2.5.json"
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    pruna_logger.addHandler(handler)
    try:
        model = smash(load_tiny_pipeline(), SmashConfig({"tome_cache": {"preset": tuned}}, device="cpu"))
        model.save_pretrained(tmp_path)
        pruna_tools.PrunaModel.from_pretrained(tmp_path)
    finally:
        pruna_logger.removeHandler(handler)
    told = [line for line in lines if line.startswith("tome_cache: this preset was chosen on another scheduler")]
    assert len(told) == 2


def test_configurations_keep_their_own_presets():
    fast = SmashConfig({"tome_cache": {"preset": "fast"}}, device="cpu")
    none = SmashConfig(["tome_cache"], device="cpu")
    tuned = SmashConfig({"tome_cache": {"preset": TUNED}}, device="cpu")
    fast.add({"tome_cache": {"interval": 3}})
    assert fast["tome_cache_preset"] == copy.deepcopy(fast)["tome_cache_preset"] == "fast"
    assert none["tome_cache_preset"] is None and tuned["tome_cache_preset"]["format"] == "tomesd_plus preset"


def test_merging_and_the_cache_go_together(tmp_path):
    expected = make_pipeline("sd")
    apply_token_merging(expected)
    apply_feature_cache(expected, 3, forecast=0.85)
    loaded = saved_and_loaded(make_pipeline("sd"), ["tome_cache", "tome_sd"], tmp_path)
    assert torch.equal(generate(loaded), generate(expected)) and merging_report(loaded).removed[1] > 0


@pytest.mark.parametrize("kind", ["sdxl", "img2img", "controlnet"])
def test_other_pipelines(kind, tmp_path):
    """SDXL has no self-attention at the finest level: the default finds the one that has."""
    pipe = smashed(make_pipeline(kind), ["tome_sd", "tome_cache"])
    picture = generate(pipe)
    level = 2 if kind == "sdxl" else 1
    assert merging_report(pipe).removed[level] > 0.3
    assert torch.equal(picture, generate(pipe)) and not torch.equal(picture, generate(make_pipeline(kind)))
    loaded = saved_and_loaded(make_pipeline(kind), ["tome_sd", "tome_cache"], tmp_path)
    assert torch.allclose(picture, generate(loaded), atol=1e-5)  # SDXL loads with other last bits, smashed or not


def test_a_unet_by_itself(tmp_path):
    unet = make_pipeline("sd").unet
    loaded = saved_and_loaded(copy.deepcopy(unet), ["tome_sd", "tome_cache"], tmp_path)
    call = (torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(999))
    with torch.no_grad():
        untouched, merged = (model(*call, torch.zeros(2, 77, 16)).sample for model in (unet, loaded))
    assert merging_report(loaded).removed[1] > 0.3 and not torch.equal(untouched, merged)


def test_calls_of_a_transformer_are_skipped_and_its_layers_refused(caplog):
    from transformer_tools import make_pipeline as make_transformer_pipeline

    kinds = make_transformer_pipeline("pixart-alpha"), make_transformer_pipeline("pixart-alpha")
    untouched, skipping = kinds
    skipping = smashed(skipping, {"tome_cache": {"skip": "calls", "interval": 2}})
    call = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "pt", "height": 32, "width": 32}
    pictures = [
        pipe("a cat", generator=torch.Generator().manual_seed(0), use_resolution_binning=False, **call).images
        for pipe in (untouched, skipping)
    ]
    assert not torch.equal(*pictures)
    with pytest.raises(TypeError, match=r"tome_cache: .*UNet"):
        smashed(untouched, ["tome_cache"])
    with pytest.raises(ValueError, match="not compatible with tome_sd"):
        smashed(untouched, ["tome_sd"])


def test_removal_gives_the_bits_back():
    pipe = smashed(make_pipeline("sd"), ["tome_sd"])
    generate(pipe)
    remove_token_merging(pipe)
    assert torch.equal(generate(pipe), generate(make_pipeline("sd")))
