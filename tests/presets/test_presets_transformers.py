"""Presets on transformers: those that skip calls or merge go on and off, those that cache layers are refused."""

import warnings

import pytest
import torch
from cache_tools import kinds
from transformer_tools import call, generate, make_pipeline, make_transformer

from tomesd_plus import (
    PRESETS,
    FeatureCacheConfig,
    FullSteps,
    LinearSchedule,
    Preset,
    ToMeConfig,
    apply_feature_cache,
    apply_preset,
    apply_token_merging,
    preset,
    remove_feature_cache,
    remove_preset,
    remove_token_merging,
)
from tomesd_plus.host.names import model_name, scheduler_name
from tomesd_plus.presets import Measured

SKIPS = FeatureCacheConfig(plan="FFSFSS")
MERGES = ToMeConfig(ratio=LinearSchedule(0.7, 0.3))
FAMILIES = ["pixart-sigma", "sd35", "flux"]


def run(pipe):
    return generate(pipe, num_inference_steps=6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("merging", "cache"), [(MERGES, SKIPS), (MERGES, None), (None, SKIPS)], ids=["both", "merging", "skipping"]
)
def test_a_preset_does_what_its_parts_do_and_leaves_nothing(family, merging, cache, tmp_path):
    pipe = make_pipeline(family)
    plain = run(pipe)
    if merging is not None:
        apply_token_merging(pipe, merging)
    if cache is not None:
        apply_feature_cache(pipe, cache)
    expected = run(pipe)
    if merging is not None:
        remove_token_merging(pipe)
    if cache is not None:
        remove_feature_cache(pipe)
    Preset("mine", merging, cache).save(tmp_path / "mine.json")
    with preset(pipe, tmp_path / "mine.json") as report:
        assert torch.equal(run(pipe), expected) and not torch.equal(expected, plain)
        assert report.cache is None or kinds(report.cache) == "FFsFss"
        assert report.merging is None or report.merging.merged
    assert torch.equal(run(pipe), plain)
    apply_preset(pipe, Preset("mine", merging, cache))
    assert torch.equal(run(pipe), expected)
    remove_preset(pipe)
    assert torch.equal(run(pipe), plain)
    with pytest.warns(UserWarning, match="nothing to remove"):
        remove_preset(pipe)


@pytest.mark.parametrize("family", [*FAMILIES, "chroma"])
def test_presets_that_cache_layers_are_refused_and_change_nothing(family):
    pipe = make_pipeline(family)
    plain = run(pipe)
    for name in PRESETS:
        with pytest.raises(TypeError, match=r"caches layers of a UNet.*let tune find one"):
            apply_preset(pipe, name)
    assert torch.equal(run(pipe), plain)
    with pytest.warns(UserWarning, match="nothing to remove"):
        remove_preset(pipe)


def test_a_transformer_that_is_not_known_takes_skips_but_no_merging():
    pipe = make_pipeline("chroma")
    plain = run(pipe)
    with pytest.raises(TypeError, match="not in a ChromaTransformer2DModel"):
        apply_preset(pipe, Preset("mine", MERGES, SKIPS))
    assert torch.equal(run(pipe), plain)
    with preset(pipe, Preset("mine", None, SKIPS)) as report:
        run(pipe)
        assert report.cache.skipped and report.merging is None
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"full_steps": "cache"}, 'full_steps="cache" need'),
        ({"full_steps": FullSteps("cache", 0.5), "plan_every": "cache"}, 'full_steps="cache" and plan_every'),
        ({"cached_ratio": 0.75}, "cached_ratio need cached steps"),
    ],
)
def test_options_of_cached_steps_are_refused(options, words):
    pipe = make_pipeline("sd3")
    with pytest.raises(ValueError, match=f"{words}.* a transformer run in full, or not at all"):
        apply_token_merging(pipe, ratio=0.5, **options)
    with pytest.raises(ValueError, match=words):
        apply_preset(pipe, Preset("mine", ToMeConfig(ratio=0.5, **options), SKIPS))
    with pytest.warns(UserWarning, match="nothing to remove"):
        remove_preset(pipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_for_fewer_steps_says_so_where_it_is_called_with_others(family):
    """Flux gives its transformer no timestep of the scheduler's own."""
    pipe = make_pipeline(family)
    told = Measured(
        model_name(pipe.transformer), scheduler_name(pipe.scheduler), 12, 3.0, "4 × 4", "CPU", "torch", 1, 0, 2.0,
        None, 30.0, None, {"cached": 0.1}, False, 6,
    )  # fmt: skip
    apply_preset(pipe, Preset("", None, FeatureCacheConfig(plan="FSSFSF"), steps=6, measured=told))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(pipe, num_inference_steps=6)
    with pytest.warns(UserWarning, match="to be called with num_inference_steps=6, .* was called with 12"):
        generate(pipe, num_inference_steps=12)


@pytest.mark.parametrize(
    "layers", ["cross_attention", ("self_attention", "cross_attention"), ("cross_attention", "mlp")]
)
@pytest.mark.parametrize("family", ["sd3", "sd35", "flux"])
def test_cross_attention_is_refused_where_attention_is_joint(family, layers):
    with pytest.raises(ValueError, match="attend to text and image at once"):
        apply_token_merging(make_transformer(family), ratio=0.5, layers=layers)
    model = make_transformer("pixart-sigma")
    report = apply_token_merging(model, ratio=0.5, layers=layers)
    call(model, 8, 8)
    assert report.merged
