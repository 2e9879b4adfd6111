"""What is refused, and in which words: wrong models, wrong hyperparameters, smashing twice."""

import logging

import pruna_tools  # noqa: F401
import pytest
import torch
from conftest import generate, make_pipeline
from pruna import SmashConfig
from pruna.logging.logger import pruna_logger
from pruna_tools import make_vit, smashed
from transformers import SiglipVisionConfig, SiglipVisionModel

from tomesd_plus import remove_feature_cache, remove_token_merging
from tomesd_plus.presets import PRESETS


@pytest.mark.parametrize("algorithm", ["tome_sd", "tome_cache", "tome_vision"])
@pytest.mark.parametrize("model", ["a name", None, torch.nn.Linear(2, 2), "vae"])
def test_models_without_the_parts_are_refused_with_the_reason(algorithm, model):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    pruna_logger.addHandler(handler)
    try:
        with pytest.raises(ValueError, match=f"not compatible with {algorithm}"):
            smashed(make_pipeline("sd").vae if model == "vae" else model, [algorithm])
    finally:
        pruna_logger.removeHandler(handler)
    assert any(line.startswith(f"{algorithm}: ") and "expected" in line for line in lines)


def test_each_is_for_its_kind_of_model():
    with pytest.raises(ValueError, match="not compatible with tome_vision"):
        smashed(make_pipeline("sd"), ["tome_vision"])
    with pytest.raises(ValueError, match="not compatible with tome_sd"):
        smashed(make_vit(), ["tome_sd"])


@pytest.mark.parametrize(
    "hyperparameters, said",
    [
        ({"tome_sd": {"reduction_ratio": 0.9}}, r"tome_sd_reduction_ratio.*\[0.0, 0.75\]"),
        ({"tome_sd": {"method": "average"}}, "tome_sd_method.*{merge, prune}"),
        ({"tome_sd": {"adaptive": "yes"}}, "tome_sd_adaptive"),
        ({"tome_sd": {"schedule": "sine"}}, "tome_sd_schedule.*{auto, constant, linear, cosine, steps}"),
        ({"tome_sd": {"max_downsample": 3}}, "tome_sd_max_downsample.*{auto, 1, 2, 4, 8}"),
        ({"tome_sd": {"layers": "attention"}}, "layers must be 'block', or one or more of"),
        ({"tome_sd": {"layers": ["block", "mlp"]}}, "layers must be 'block', or one or more of"),
        ({"tome_sd": {"layers": []}}, "layers must be 'block', or one or more of"),
        ({"tome_sd": {"layers": None}}, "layers is a name or a list of names, not None"),
        ({"tome_sd": {"layers": [["mlp"]]}}, r"layers is a name or a list of names, not \[\['mlp'\]\]"),
        ({"tome_cache": {"interval": 0}}, r"tome_cache_interval.*\[1, 50\]"),
        ({"tome_cache": {"forecast": 2.0}}, r"tome_cache_forecast.*\[0.0, 1.0\]"),
        ({"tome_cache": {"skip": "steps"}}, "tome_cache_skip.*{layers, calls}"),
        ({"tome_cache": {"preset": "fasst"}}, "unknown preset 'fasst': choose from quality, balanced, fast"),
        ({"tome_cache": {"preset": 3}}, "expected a preset, its name or a path, not 3"),
        ({"tome_cache": {"preset": "no/such.json"}}, "cannot read the preset no/such.json"),
        ({"tome_cache": {"preset": {"interval": 2}}}, "what is given as preset is no preset"),
        ({"tome_cache": {"preset": {"interval": {2}}}}, "what is given as preset cannot be JSON"),
        ({"tome_vision": {"method": "tome"}}, "tome_vision_method.*{merging, evit, ats}"),
        ({"tome_vision": {"r": -1}}, r"tome_vision_r\b.*\[0, 1024\]"),
        ({"tome_vision": {"reduction_ratio": 1.0}}, "tome_vision_reduction_ratio"),
    ],
)
def test_wrong_values_are_refused_when_they_are_given(hyperparameters, said):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        SmashConfig(hyperparameters, device="cpu")


@pytest.mark.parametrize(
    "algorithms, said",
    [
        ({"tome_sd": {"adaptive": True, "schedule": "linear"}}, "tome_sd: adaptive .* leave out schedule"),
        ({"tome_sd": {"similarity": 0.5}}, "tome_sd: similarity .* leave out similarity"),
        ({"tome_cache": {"preset": "fast", "interval": 2}}, "tome_cache: a preset .* leave out interval"),
        ({"tome_cache": {"skip": "calls", "forecast": 0.5}}, "tome_cache: .* leave out forecast"),
        ({"tome_cache": {"force": True}}, "tome_cache: force keeps a preset by name .* leave out force"),
        ({"tome_cache": {"preset": PRESETS["fast"], "force": True}}, "tome_cache: .* leave out force"),
        ({"tome_sd": {}, "tome_cache": {"preset": "fast"}}, "tome_cache: the preset merges tokens itself"),
        (["tome_cache", "deepcache"], "deepcache is incompatible with tome_cache"),
    ],
)
def test_contradictions_are_refused_before_anything_is_changed(algorithms, said):
    pipe = make_pipeline("sd")
    with pytest.raises(ValueError, match=said):
        smashed(pipe, algorithms)
    assert torch.equal(generate(pipe), generate(make_pipeline("sd")))


@pytest.mark.parametrize(
    "hyperparameters, said",
    [
        ({"adaptive": True, "reduction_ratio": 0.5}, "leave out reduction_ratio"),
        ({"adaptive": True, "r": 4, "inflection": 1.0}, "leave out r and inflection"),
        ({"adaptive": True, "method": "evit"}, "not for 'evit'"),
        ({"adaptive": True, "method": "ats", "similarity": 0.5}, "leave out similarity"),
        ({"similarity": 0.5}, "leave out similarity"),
        ({"r": 4, "reduction_ratio": 0.5}, "reduction_ratio says how much is removed, so leave out r"),
        ({"inflection": 1.0, "reduction_ratio": 0.5}, "leave out inflection"),
    ],
)
def test_contradictions_of_a_tower(hyperparameters, said):
    with pytest.raises(ValueError, match=f"tome_vision: .*{said}$"):
        smashed(make_vit(), {"tome_vision": hyperparameters})


@pytest.mark.parametrize("method", ["evit", "ats"])
def test_a_method_that_a_tower_lacks_the_token_for_is_refused_before_anything_is_changed(method):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8))
    with pytest.raises(ValueError, match=rf"tome_vision: the method '{method}' looks at the class token"):
        smashed(model, {"half": True, "tome_vision": {"method": method}})
    assert next(model.parameters()).dtype == torch.float32


def test_smashing_twice_says_how_to_take_it_off():
    pipe = smashed(make_pipeline("sd"), ["tome_sd"])
    with pytest.raises(ValueError, match=r"tome_sd: token merging is on .*remove_token_merging"):
        smashed(pipe, ["tome_sd"])
    with pytest.raises(ValueError, match=r"tome_cache: token merging is on .*remove_token_merging"):
        smashed(pipe, {"tome_cache": {"preset": "fast"}})
    smashed(pipe, ["tome_cache"])  # beside it
    with pytest.raises(ValueError, match=r"tome_cache: a feature cache is on .*remove_feature_cache"):
        smashed(pipe, ["tome_cache"])
    remove_feature_cache(pipe)
    remove_token_merging(pipe)
    smashed(pipe, {"tome_cache": {"preset": "fast"}})
    vit = smashed(make_vit(), ["tome_vision"])
    with pytest.raises(ValueError, match="tome_vision: token merging is on"):
        smashed(vit, ["tome_vision"])
