"""Tuning: what it finds, that it finds it again, and that it leaves nothing behind."""

import sys
import warnings

import pytest
import torch
from cache_tools import kinds
from conftest import generate, hooks, make_pipeline
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler

from tomesd_plus import Preset, apply_feature_cache, apply_preset, load_tiny_pipeline, preset, tune
from tomesd_plus.tiny import held_out_captions
from tomesd_plus.tuning import costs, trials
from tomesd_plus.tuning.pictures import Task, psnr_of, squared_error, switched_on
from tomesd_plus.tuning.plans import Costs, Plan, even_plans, neighbours

COSTS = {"cached": 0.1}
CALL = {
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
    "costs": COSTS,
    "progress": False,
    "max_generations": 7,
    "batch_size": 4,
}
SMALL = {"height": 32, "width": 32}
PROMPTS = ["a cat", "a", "cat cat", "a a"]


@pytest.fixture
def dpm():
    pipe = make_pipeline("sd")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def test_the_same_seed_and_costs_give_the_same_and_leave_the_pipeline_untouched(dpm, tmp_path):
    plain, before = generate(dpm, num_inference_steps=6), dict(vars(dpm))
    found = [tune(dpm, PROMPTS, speedup=[1.5, 2], **CALL, **SMALL) for _ in range(2)]
    assert found[0] == found[1] and torch.equal(generate(dpm, num_inference_steps=6), plain)
    assert not hooks(dpm) and dict(vars(dpm)) == before
    for chosen, speedup in zip(found[0], (1.5, 2)):
        told = chosen.measured
        assert told.speedup >= speedup and told.prompts == 3 and told.held_out == 1 and told.held_out_psnr
        assert not told.costs_measured and told.whole_speedup is None and told.costs["cached"] == 0.1
        assert told.steps == 6 and "steps" in told.beside[0].name and told.scheduler.startswith("DPMSolver")
        assert (
            max(row.psnr for row in told.beside if set(row.name) <= set("FCS") and row.speedup >= speedup) <= told.psnr
        )
        chosen.save(tmp_path / "tuned.json")
        assert Preset.load(tmp_path / "tuned.json") == chosen
        with preset(dpm, tmp_path / "tuned.json") as report:
            generate(dpm, num_inference_steps=6)
            assert kinds(report.cache).upper() == chosen.cache.plan.letters
            generate(dpm, num_inference_steps=9)
            assert report.cache.full < 9


@pytest.mark.filterwarnings("ignore:.* steps are closer than what tune has found")  # and are not compared here
@pytest.mark.slow
def test_the_embedded_pipeline_tuned_beats_even_spacing_at_equal_cost():
    pipe = load_tiny_pipeline()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    captions = held_out_captions()
    call = {"num_inference_steps": 20, "guidance_scale": 3.0, "batch_size": 4}
    chosen = tune(pipe, captions[:4], speedup=2.5, costs=COSTS, max_generations=14, progress=False, **call)
    task, costs = Task(pipe, 20, 3.0, 50, 4, {}), Costs.of(COSTS)
    prompts = list(enumerate(captions[100:104]))
    references = task.pictures(prompts)

    def figure(plan):
        with switched_on(pipe, plan):
            return psnr_of(squared_error(task.pictures(prompts), references))

    tuned = figure(Plan(chosen.cache.plan.letters, chosen.cache.forecast, chosen.cache.order))
    even = even_plans(20, 20 / 2.5, costs, [1] * 20, True)
    assert chosen.measured.speedup >= 2.5
    assert tuned > max(figure(plan) for plan in even) + 0.5


def test_fewer_steps_may_be_chosen_and_are_told(dpm):
    chosen = tune(dpm, PROMPTS[:2], speedup=2, steps="free", **CALL, **SMALL)
    told = chosen.measured
    assert chosen.steps <= 6 and told.psnr >= max(row.psnr for row in told.beside if row.speedup >= 2)
    assert told.prompts == told.held_out == 1
    report = apply_preset(dpm, chosen)
    generate(dpm, num_inference_steps=chosen.steps)
    if report.cache is not None:
        assert kinds(report.cache).upper() == chosen.cache.plan.letters


def test_a_budget_of_fidelity(dpm):
    chosen = tune(dpm, PROMPTS[:1], psnr=40, **CALL, **SMALL)
    assert chosen.measured.psnr >= 40 and chosen.measured.speedup > 1
    assert chosen.measured.held_out == 0 and chosen.measured.held_out_psnr is None


@pytest.mark.parametrize("after", [3, 8])
def test_interrupted_it_gives_the_best_so_far(dpm, monkeypatch, after):
    plain, work = generate(dpm), trials.Trials.work
    calls = []

    def interrupt(self, amount, what):
        work(self, amount, what)
        calls.append(what)
        if len(calls) == (after if after > 3 else 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(trials.Trials, "work", interrupt)
    if after == 3:  # nothing was tried
        with pytest.raises(KeyboardInterrupt):
            tune(dpm, PROMPTS[:2], speedup=1.2, **CALL, **SMALL)
    else:
        chosen = tune(dpm, PROMPTS[:2], speedup=1.2, **CALL, **SMALL)
        assert chosen.measured.speedup >= 1.2 and len(calls) == after
    assert torch.equal(generate(dpm), plain) and not hooks(dpm)


@pytest.mark.parametrize("kind", ["sdxl", "img2img", "controlnet"])
def test_other_pipelines_get_what_their_calls_need(kind):
    pipe = make_pipeline(kind)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    call = {"img2img": {"image": picture, "strength": 0.7}, "controlnet": {"image": picture} | SMALL}.get(kind, SMALL)
    chosen = tune(pipe, PROMPTS[:1], speedup=1.5, **CALL, **call)
    assert chosen.measured.speedup >= 1.5
    with preset(pipe, chosen):
        generate(pipe, num_inference_steps=6)


def test_costs_are_measured_where_none_are_given(dpm):
    call = CALL | {"costs": None, "max_generations": 6}
    told = tune(dpm, PROMPTS[:1], speedup=1.1, **call, **SMALL).measured
    assert told.costs_measured and 0 <= told.costs["skipped"] < 1 and told.whole_speedup


@pytest.mark.parametrize("slow", [{0}, {0, 3}, {1, 2}, {0, 1, 4, 5}])
def test_a_busy_machine_does_not_change_costs(dpm, monkeypatch, slow):
    """Where other work slows whole generations down, every one of a way among them but one, shares stay."""
    true = {("none", "F"): 1.0, ("none", "C"): 0.25, ("none", "S"): 0.0, ("all", "F"): 0.75, ("all", "C"): 0.125}
    generations = []

    def calls(task, prompts, plan):
        generations.append(plan)
        factor = 3.0 if len(generations) - 1 in slow else 1.0
        return [(letter, true.get((plan.merging, letter), 0.0) * factor) for letter in plan.letters]

    monkeypatch.setattr(costs, "_calls", calls)
    found = costs.measured_costs(Task(dpm, 6, 1.0, 0, 1, SMALL), [(0, "a")], True)
    assert found == Costs(0.25, 0.0, 0.125, 0.75)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prompts": "a cat"}, "prompts must be a list"), ({"prompts": []}, "prompts must be"),
        ({"prompts": [3]}, "texts"), ({"speedup": 1}, "speedup must be"), ({"speedup": [2, "x"]}, "speedup must be"),
        ({"speedup": None}, "either speedup or psnr"), ({"psnr": 30}, "either speedup or psnr"),
        ({"speedup": None, "psnr": -1}, "psnr must be"), ({"steps": "any"}, "steps must be"),
        ({"num_inference_steps": 1}, "num_inference_steps must be"), ({"seed": -1}, "seed must be"),
        ({"batch_size": 0}, "batch_size must be"), ({"max_generations": 1}, "max_generations must be"),
        ({"generator": None}, "sets generator itself"), ({"costs": {"cached": -1}}, "cost cached must be"),
        ({"costs": {"full": 1}}, "costs must map"), ({"costs": {"cached": float("nan")}}, "cost cached"),
        ({"speedup": 100}, "no plan of 6 steps has speedup=100"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(dpm, options, match):
    call = {"prompts": PROMPTS[:1], "speedup": 2} | CALL | SMALL | options
    with pytest.raises(ValueError, match=match):
        tune(dpm, call.pop("prompts"), **call)
    assert not hooks(dpm)


def test_what_is_on_already_is_refused(dpm):
    apply_feature_cache(dpm, interval=2)
    with pytest.raises(ValueError, match="remove it first"):
        tune(dpm, PROMPTS[:1], speedup=2, **CALL)
    with pytest.raises(TypeError, match="expected a diffusers pipeline"):
        tune(torch.nn.Linear(2, 2), PROMPTS[:1], speedup=2, **CALL)


def test_plans_next_to_a_plan():
    found = {plan.letters for plan in neighbours(Plan("FCS"), True)}
    assert found == {"FFS", "FSS", "FCF", "FCC", "FSC"}
    assert {plan.letters for plan in neighbours(Plan("FSS"), False)} == {"FFS", "FSF"}


@pytest.mark.parametrize("kind", [PNDMScheduler, HeunDiscreteScheduler])
def test_each_calls_cost_is_of_what_it_has_run(kind):
    pipe = make_pipeline("sd")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    calls = costs._calls(Task(pipe, 6, 1.0, 0, 1, SMALL), [(0, "a")], Plan("FFCSFF"))
    ran = iter(calls)
    with switched_on(pipe, Plan("FFCSFF")) as report:
        generate(pipe, num_inference_steps=6, guidance_scale=1.0, **SMALL)
        assert [letter for letter, _ in ran] == list(kinds(report.cache).upper()) and len(calls) > 6


def test_a_unets_merging_is_never_charged_where_nothing_is_merged(dpm):
    given = {"cached": 0.5, "cached_merged": 0.45, "full_merged": 0.6}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        chosen = tune(dpm, PROMPTS[:2], speedup=1.3, **CALL | {"costs": given}, **SMALL)
    assert chosen.merging is None or "C" in chosen.cache.plan.letters
    report = apply_preset(dpm, chosen)
    generate(dpm, num_inference_steps=6)
    if chosen.merging is not None:
        assert any(step.removed for step in report.merging.steps)


@pytest.mark.filterwarnings("ignore:.* steps are closer than what tune has found")
def test_fewer_steps_are_counted_by_their_calls():
    pipe = make_pipeline("sd")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    chosen = tune(pipe, PROMPTS[:1], speedup=2, **CALL | {"num_inference_steps": 12}, **SMALL)
    fewer = [row for row in chosen.measured.beside if row.name.endswith("steps")]
    assert fewer[0].speedup >= 2 and fewer[0].name == "5 steps"


def test_what_every_call_is_given(dpm):
    chosen = tune(dpm, PROMPTS, speedup=1.3, negative_prompt="a dog", **CALL, **SMALL)
    assert chosen.measured.held_out == 1
    image = make_pipeline("img2img")
    options = {"image": torch.rand(1, 3, 32, 32), "strength": 0.3, "progress": False, "max_generations": 5}
    chosen = tune(image, PROMPTS[:1], speedup=1.2, num_inference_steps=20, **options)
    assert len(chosen.cache.plan.letters) == 6 and chosen.steps == 20


def test_a_budget_of_fidelity_has_rows_beside_it(dpm):
    assert tune(dpm, PROMPTS[:1], psnr=40, **CALL, **SMALL).measured.beside


def test_speeds_that_no_plan_has_are_told(dpm):
    with pytest.warns(UserWarning, match="no plan of 6 steps is 50 times as fast"):
        found = tune(dpm, PROMPTS[:1], speedup=[1.2, 50, 1.2], **CALL | {"costs": {"cached": 0.5, "skipped": 0.5}},
                     **SMALL)  # fmt: skip
    assert len(found) == 2 and found[0] == found[1]


def test_interrupted_among_the_prompts_kept_aside(dpm, monkeypatch):
    def interrupt(trials, plans, held):
        if held:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(sys.modules["tomesd_plus.tuning.tune"], "_held_out", interrupt)  # the name is the function's
    chosen = tune(dpm, PROMPTS[:2], speedup=1.2, **CALL, **SMALL)
    assert chosen.measured.speedup >= 1.2 and chosen.measured.held_out_psnr is None
