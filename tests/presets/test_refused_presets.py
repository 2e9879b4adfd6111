"""Presets by name where they were worse than fewer steps, or not tried."""

import copy
import csv
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from conftest import generate, hooks, make_pipeline
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from tomesd_plus import (
    PRESETS,
    apply_feature_cache,
    apply_preset,
    preset,
    remove_feature_cache,
    remove_preset,
    remove_token_merging,
)
from tomesd_plus.presets import tested


def test_what_is_refused_is_what_the_table_has_below_fewer_steps():
    with (Path(__file__).parents[2] / "results" / "presets.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    misses = {(row["preset"], row["solver"], int(row["steps"])) for row in rows if row["below"]}
    assert misses == tested.MISSES and {row["solver"] for row in rows} == tested.SOLVERS
    assert {int(row["steps"]) for row in rows} == set(tested.STEPS) and len(rows) == 90


@pytest.fixture
def misses(monkeypatch):
    """As if one cell of the table were a miss."""
    monkeypatch.setattr(tested, "MISSES", frozenset({("fast", "EulerDiscreteScheduler", 15)}))


def with_scheduler(kind):
    pipe = make_pipeline("sd")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.usefixtures("misses")
def test_a_cell_below_fewer_steps_is_refused_when_solver_and_steps_are_known():
    pipe = with_scheduler(EulerDiscreteScheduler)
    plain = generate(pipe, num_inference_steps=14)
    report = apply_preset(pipe, "fast")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"EulerDiscreteScheduler at 15 steps .* Call tune.*force=True"):
            generate(pipe, num_inference_steps=14)  # the nearest that was tried
    generate(pipe, num_inference_steps=20)
    assert report.cache.full < 20
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    generate(pipe, num_inference_steps=14)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    remove_preset(pipe)
    assert not hooks(pipe) and torch.equal(generate(pipe, num_inference_steps=14), plain)
    for name, force in (("fast", True), ("quality", False)):
        with preset(pipe, name, force=force) as report:
            generate(pipe, num_inference_steps=14)
            assert report.cache.full < 14
        assert not hooks(pipe)


@pytest.mark.parametrize("name", PRESETS)
def test_with_few_steps_it_names_merging_alone(pipe, name):
    apply_preset(pipe, name)
    with pytest.raises(ValueError, match=r"with 8 there is next to nothing .*apply_token_merging\(pipe, ratio=0.5\)"):
        generate(pipe, num_inference_steps=8)
    generate(pipe, num_inference_steps=18)
    with preset(make_pipeline("sd"), PRESETS[name]):  # as data, not by name: the user's own choice
        pass


@pytest.mark.usefixtures("misses")
def test_what_is_left_of_it_refuses_nothing():
    pipe = with_scheduler(EulerDiscreteScheduler)
    apply_preset(pipe, "fast")
    remove_feature_cache(pipe)
    remove_token_merging(pipe)
    generate(pipe, num_inference_steps=14)
    assert not hooks(pipe)


@pytest.mark.usefixtures("misses")
def test_copies_and_bare_models():
    pipe = with_scheduler(EulerDiscreteScheduler)
    apply_preset(pipe, "fast")
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        with pytest.raises(ValueError, match="Call tune"):
            generate(twin, num_inference_steps=15)
    unet = make_pipeline("sd").unet
    apply_preset(unet, "fast")  # knows no scheduler
    unet(torch.randn(1, 4, 16, 16), 999, torch.randn(1, 7, unet.config.cross_attention_dim))


def test_a_solver_that_was_not_tried_is_told_once():
    pipe = with_scheduler(EulerAncestralDiscreteScheduler)
    apply_preset(pipe, "balanced")
    with pytest.warns(UserWarning, match="not tried with EulerAncestralDiscreteScheduler"):
        generate(pipe, num_inference_steps=10)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the presets by name")
        generate(pipe, num_inference_steps=12)


@pytest.mark.usefixtures("misses")
def test_it_goes_with_its_own_cache():
    pipe = with_scheduler(EulerDiscreteScheduler)
    apply_preset(pipe, "fast")
    remove_feature_cache(pipe)
    remove_token_merging(pipe)
    apply_feature_cache(pipe, interval=2)
    generate(pipe, num_inference_steps=6)
    remove_feature_cache(pipe)
    apply_preset(pipe, "fast", force=True)
    generate(pipe, num_inference_steps=15)


@pytest.mark.usefixtures("misses")
def test_another_pipelines_scheduler_is_not_judged():
    pipe = with_scheduler(EulerDiscreteScheduler)
    apply_preset(pipe, "fast")
    other = StableDiffusionPipeline(**pipe.components | {"scheduler": DDIMScheduler()}, requires_safety_checker=False)
    generate(other, num_inference_steps=15)
    with pytest.raises(ValueError, match="Call tune"):
        generate(pipe, num_inference_steps=15)


def test_image_to_image_takes_a_part_of_the_steps():
    pipe = make_pipeline("img2img")
    options = {"image": torch.rand(1, 3, 32, 32), "num_inference_steps": 20}
    apply_preset(pipe, "quality")
    generate(pipe, strength=0.6, **options)
    with pytest.raises(ValueError, match="with 4 there is next to nothing"):
        generate(pipe, strength=0.2, **options)


def test_heun_with_a_controlnet_has_its_last_step_in_full():
    pipe = make_pipeline("controlnet")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    report = apply_preset(pipe, "fast", force=True)
    generate(pipe, num_inference_steps=10)
    last = [step.kind for step in report.cache.steps][-1]
    assert last == "full" and report.cache.skipped
