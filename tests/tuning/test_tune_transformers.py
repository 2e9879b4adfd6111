"""Tuning transformers: steps to skip are found, however often guidance calls them, and nothing is left behind."""

import pytest
import torch
from cache_tools import kinds
from conftest import hooks
from transformer_tools import generate, make_image_to_image, make_pipeline

from tomesd_plus import apply_preset, tune
from tomesd_plus.tuning.pictures import Task
from tomesd_plus.tuning.recording import record

PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SMALL = {"height": 32, "width": 32, "max_sequence_length": 12}
PIXART = SMALL | {"use_resolution_binning": False, "clean_caption": False}
TRUE_GUIDANCE = {"true_cfg_scale": 4.0, "negative_prompt": "a dog"}
PROMPTS = [(0, "a cat"), (1, "a")]
CASES = {
    "pixart-sigma": (lambda: make_pipeline("pixart-sigma"), PIXART, 1),
    "sd35": (lambda: make_pipeline("sd35"), SMALL, 1),
    "flux": (lambda: make_pipeline("flux"), SMALL, 1),
    "flux, true guidance": (lambda: make_pipeline("flux"), SMALL | TRUE_GUIDANCE, 2),
    "sd3, image to image": (
        lambda: make_image_to_image("sd3"), {"image": PICTURE, "strength": 0.7, "max_sequence_length": 12}, 1
    ),
    "chroma": (lambda: make_pipeline("chroma"), SMALL | {"negative_prompt": "a dog"}, 2),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def test_what_is_recorded_is_what_the_scheduler_is_given(case):
    make, options, calls = case
    options = options | ({"negative_prompt": ["a dog"] * 2} if "negative_prompt" in options else {})
    options = options | ({"image": PICTURE.expand(2, -1, -1, -1)} if "image" in options else {})
    pipe, given = make(), []
    step = type(pipe.scheduler).step

    def taken(model_output, timestep, sample, *args, **kwargs):
        given.append(model_output.clone())
        return step(pipe.scheduler, model_output, timestep, sample, *args, **kwargs)

    task = Task(pipe, 6, None, 0, 2, options)
    pipe.scheduler.step = taken
    task.pictures(PROMPTS)
    del pipe.scheduler.step
    before = hooks(pipe.transformer)
    made = record(task, PROMPTS, 6, caches=False)
    assert made.outputs.shape[:2] == (len(given), 2) and made.falling
    assert all(torch.equal(kept, output.flatten(1)) for kept, output in zip(made.outputs, given, strict=True))
    assert made.calls == (calls,) * len(given) and made.levels[0] > 0.6
    assert "step" not in vars(pipe.scheduler) and hooks(pipe.transformer) == before


def test_a_tuned_preset_is_found_applied_and_taken_off(case, tmp_path):
    make, options, calls = case
    pipe = make()
    run = dict(options) | {"num_inference_steps": 6}
    plain = generate(pipe, **run)
    chosen = tune(
        pipe, ["a cat", "a"], speedup=1.4, num_inference_steps=6, costs={"cached": 1.0}, max_generations=6,
        progress=False, **options,
    )  # fmt: skip
    assert torch.equal(generate(pipe, **run), plain) and "forward" not in vars(pipe.transformer)
    assert chosen.measured.speedup >= 1.4 and set(chosen.cache.plan.letters) == {"F", "S"}
    chosen.save(tmp_path / "tuned.json")
    report = apply_preset(pipe, tmp_path / "tuned.json")
    generate(pipe, **run)
    assert kinds(report.cache).upper() == "".join(letter * calls for letter in chosen.cache.plan.letters)
    again = tune(
        make(), ["a cat", "a"], speedup=1.4, num_inference_steps=6, costs={"cached": 1.0}, max_generations=6,
        progress=False, **options,
    )  # fmt: skip
    assert again == chosen


@pytest.mark.parametrize("name", ["pixart-sigma", "sd35", "flux"])
def test_tokens_are_merged_where_that_is_the_closest_at_the_speed(name):
    make, options, _ = CASES[name]
    costs = {"cached": 1.0, "skipped": 1.0, "full_merged": 0.5}  # as if skipping saved nothing
    pipe, call = make(), {"num_inference_steps": 4, "max_generations": 5, "progress": False, **options}
    chosen = tune(pipe, ["a cat", "a"], speedup=1.9, costs=costs, **call)
    assert chosen.cache is None and chosen.merging.schedules and chosen.measured.speedup == 2
    report = apply_preset(pipe, chosen)
    generate(pipe, num_inference_steps=4, **options)
    assert all(step.removed for step in report.merging.steps)


def test_what_merging_costs_is_measured():
    chosen = tune(make_pipeline("sd35"), ["a"], speedup=1.1, num_inference_steps=4, max_generations=5, progress=False,
                  **SMALL)  # fmt: skip
    assert "full_merged" in chosen.measured.costs and "cached_merged" not in chosen.measured.costs
    unknown = tune(make_pipeline("chroma"), ["a"], speedup=1.1, num_inference_steps=4, max_generations=5,
                   progress=False, **SMALL, negative_prompt="a dog")  # fmt: skip
    assert "full_merged" not in unknown.measured.costs
