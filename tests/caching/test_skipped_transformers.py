"""Whole calls of transformers that are skipped: of each family, however often a step calls it, and after failures."""

import copy
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cache_tools import kinds
from conftest import hooks
from transformer_tools import (
    FAMILIES,
    call,
    generate,
    make_controlled,
    make_image_to_image,
    make_pipeline,
    make_transformer,
)

from tomesd_plus import (
    IntervalSchedule,
    StepPlan,
    apply_feature_cache,
    apply_token_merging,
    feature_cache,
    generation,
    remove_feature_cache,
    remove_token_merging,
    token_merging,
)
from tomesd_plus.host import transformers

PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TRUE_GUIDANCE = {"true_cfg_scale": 4.0, "negative_prompt": "a dog"}
PLAN = "FFSSFS"


@dataclass(frozen=True)
class Case:
    """A pipeline and its call.

    Args:
        make: Makes the pipeline.
        options: Of its call.
        calls: Of the transformer at each step.
    """

    make: Any
    options: dict[str, Any] = field(default_factory=dict)
    calls: int = 1

    def run(self, pipe, seed=0, **options):
        torch.manual_seed(seed)  # the host draws the latents of SD3's control images from no generator
        return generate(pipe, seed, **{"num_inference_steps": len(PLAN)} | self.options | options)


def of(make, family, calls=1, **options):
    return Case(lambda: make(family), options, calls)


CASES = {
    **{family: of(make_pipeline, family) for family in FAMILIES},
    **{f"{family}, two pictures": of(make_pipeline, family, prompt=["a cat", "a"]) for family in ("sd3", "flux")},
    "flux, true guidance": of(make_pipeline, "flux", 2, **TRUE_GUIDANCE),
    "flux, true guidance, two pictures": of(make_pipeline, "flux", 2, prompt=["a", "b"], **TRUE_GUIDANCE),
    "sd3, image to image": of(make_image_to_image, "sd3", image=PICTURE, strength=1.0),
    "flux, image to image": of(make_image_to_image, "flux", image=PICTURE, strength=1.0),
    "flux, image to image, true guidance": of(make_image_to_image, "flux", 2, image=PICTURE, strength=1.0,
                                              **TRUE_GUIDANCE),
    "sd3, ControlNet": of(make_controlled, "sd3", control_image=PICTURE),
    "flux, ControlNet": of(make_controlled, "flux", control_image=PICTURE),
    "flux, ControlNet, true guidance": of(make_controlled, "flux", 2, control_image=PICTURE, **TRUE_GUIDANCE),
    "chroma": of(make_pipeline, "chroma", 2, negative_prompt="a dog", guidance_scale=4.0),  # not one that is known
}  # fmt: skip


def cases(names):
    """Parameters, the rarer combinations marked slow."""
    rarer = {name for name in CASES if name == "pixart-sigma" or "two" in name or "to image" in name}
    marks = {name: [pytest.mark.slow] if name in rarer else [] for name in names}
    return [pytest.param(CASES[name], id=name, marks=marks[name]) for name in names]


@pytest.fixture(params=cases(CASES))
def case(request):
    return request.param


def pattern(letters, calls):
    return "".join(letter.replace("S", "s") * calls for letter in letters)


# What runs, and what stands in --------------------------------------------------------------------------------------


def test_a_skipped_step_runs_nothing_and_the_next_picture_is_the_same(case):
    pipe = case.make()
    plain, ran = case.run(pipe), Counter()
    controlnet = getattr(pipe, "controlnet", None)
    for net in filter(None, (pipe.transformer, controlnet)):
        net.transformer_blocks[0].register_forward_hook(lambda *_, net=net: ran.update([net]))
    before = hooks(pipe.transformer)
    report = apply_feature_cache(pipe, plan=PLAN)
    picture = case.run(pipe)
    assert kinds(report) == pattern(PLAN, case.calls)
    full = PLAN.count("F")
    assert ran == {pipe.transformer: full * case.calls} | ({controlnet: full} if controlnet else {})
    assert not torch.equal(picture, plain) and (picture - plain).abs().mean() < 0.02
    levels = [step.noise_level for step in report.steps]
    assert levels == sorted(levels, reverse=True) and levels[0] > 0.99 and levels[-1] < 0.4
    assert torch.equal(case.run(pipe), picture) and kinds(report) == pattern(PLAN, case.calls)
    remove_feature_cache(pipe)
    assert torch.equal(case.run(pipe), plain)
    assert "forward" not in vars(pipe.transformer) and hooks(pipe.transformer) == before
    assert controlnet is None or ("forward" not in vars(controlnet) and not controlnet._forward_pre_hooks)


def test_each_call_of_a_step_goes_on_along_its_own_outputs(case):
    pipe = case.make()
    apply_feature_cache(pipe, plan=PLAN, order=1)
    given = []
    pipe.transformer.register_forward_hook(lambda model, args, output: given.append(output[0].clone()))
    case.run(pipe)
    assert len(given) == len(PLAN) * case.calls
    for branch in range(case.calls):
        output = given[branch :: case.calls]
        assert not torch.equal(output[0], output[1])
        torch.testing.assert_close(output[2], 2 * output[1] - output[0])
        torch.testing.assert_close(output[3], 3 * output[1] - 2 * output[0])
        torch.testing.assert_close(output[5], output[4] + (output[4] - output[1]) / 3)
    if case.calls == 2:
        assert not torch.equal(given[4], given[5])  # two prompts


@pytest.mark.parametrize("after", [0, 1, 3])
def test_what_a_failed_generation_has_left_is_not_taken_by_the_next(case, after):
    pipe = case.make()
    report = apply_feature_cache(pipe, plan=PLAN)
    other = {"prompt": "b a"} if isinstance(case.options.get("prompt", ""), str) else {"prompt": ["b a", "c"]}
    expected = case.run(pipe, seed=1, **other)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) > after * case.calls:
            raise ZeroDivisionError

    broken = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        case.run(pipe)
    broken.remove()
    assert torch.equal(case.run(pipe, seed=1, **other), expected)
    assert kinds(report) == pattern(PLAN, case.calls)


def test_other_sizes_and_batches_are_generations_of_their_own(case):
    pipe, fresh = case.make(), case.make()
    apply_feature_cache(pipe, plan=PLAN)
    first = case.run(pipe)
    batch = "a cat" if isinstance(case.options.get("prompt"), list) else ["a cat", "a"]
    for other in ({"height": 48}, {"prompt": batch}):
        if "height" in other and "image" in case.options:
            continue  # the picture's
        report = apply_feature_cache(fresh, plan=PLAN)
        expected = case.run(fresh, **other)
        remove_feature_cache(fresh)
        assert kinds(report) == pattern(PLAN, case.calls)
        assert torch.equal(case.run(pipe, **other), expected)
    assert torch.equal(case.run(pipe), first)


# By the noise level -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_noise_levels_are_those_that_merging_sees(family):
    pipe = make_pipeline(family)
    cached, merged = apply_feature_cache(pipe, plan=PLAN), apply_token_merging(pipe, ratio=0.5)
    generate(pipe, num_inference_steps=6)
    levels = [step.noise_level for step in cached.steps]
    assert [step.noise_level for step in merged.steps] == levels
    if "Flow" in type(pipe.scheduler).__name__:
        assert levels == pytest.approx(pipe.scheduler.sigmas[:6].tolist(), abs=1e-6)


@pytest.mark.parametrize("name", [*FAMILIES, "flux, true guidance", "chroma"])
def test_plans_and_intervals_follow_the_noise_level(name):
    case = CASES[name]
    pipe = case.make()
    with feature_cache(pipe, plan="FFFFFF") as report:
        case.run(pipe)
        levels = tuple(step.noise_level for step in report.steps)[:: case.calls]
    with feature_cache(pipe, plan=StepPlan(PLAN, levels)) as report:
        for steps in (6, 12):
            case.run(pipe, num_inference_steps=steps)
            made = kinds(report)[:: case.calls]
            assert len(made) == steps and "s" in made[: steps - 2] and kinds(report) == pattern(made, case.calls)
        assert made.count("s") > 2
    with feature_cache(pipe, IntervalSchedule((2, 4)), branch="nothing") as report:
        case.run(pipe, num_inference_steps=12)
        made = kinds(report)[:: case.calls]
        noisy = sum(step.noise_level > 0.5 for step in report.steps) // case.calls
        assert "Fss" not in made[:noisy] and "Fsss" in made[noisy - 1 :]


@pytest.mark.parametrize("name", ["flux", "flux, true guidance", "flux, ControlNet, true guidance"])
def test_flux_is_asked_for_its_timestep_at_the_first_step_only(name, monkeypatch):
    case, asked = CASES[name], []
    pipe = case.make()
    apply_feature_cache(pipe, plan=PLAN)
    number = transformers._number
    monkeypatch.setattr(transformers, "_on_host", lambda timestep: False)
    monkeypatch.setattr(transformers, "_number", lambda timestep: asked.append(1) or number(timestep))
    followers = case.calls + hasattr(pipe, "controlnet")  # calls of a step
    for generations in (1, 2):
        case.run(pipe)
        assert len(asked) == generations * followers


# Beside merging, ControlNets, copies and threads ---------------------------------------------------------------------


@pytest.mark.parametrize("merging_first", [True, False])
@pytest.mark.parametrize("case", cases([name for name in CASES if name != "chroma"]))
def test_merging_beside_skipped_calls(case, merging_first):
    pipe = case.make()
    plain = case.run(pipe)
    with feature_cache(pipe, plan=PLAN):
        skipped = case.run(pipe)
    with token_merging(pipe, ratio=0.0), feature_cache(pipe, plan=PLAN):
        assert torch.equal(case.run(pipe), skipped)
    report = apply_token_merging(pipe, ratio=0.5) if merging_first else None
    cached = apply_feature_cache(pipe, plan=PLAN)
    report = report or apply_token_merging(pipe, ratio=0.5)
    picture = case.run(pipe)
    assert kinds(cached) == pattern(PLAN, case.calls)
    assert [step.removed for step in report.steps] == [{1: 0.5} if step.full else {} for step in cached.steps]
    assert not torch.equal(picture, skipped) and torch.equal(case.run(pipe), picture)
    remove_token_merging(pipe)
    assert torch.equal(case.run(pipe), skipped)
    remove_feature_cache(pipe)
    assert torch.equal(case.run(pipe), plain)


@pytest.mark.parametrize("name", ["sd3, ControlNet", "flux, ControlNet", "flux, ControlNet, true guidance"])
def test_a_controlnet_that_is_skipped_changes_nothing(name):
    case = CASES[name]
    pipe, calls = case.make(), []
    pipe.controlnet.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    plain, pictures = case.run(pipe), []
    assert not torch.equal(case.run(pipe, control_image=1 - PICTURE), plain)  # it does something
    for target, count in ((pipe, PLAN.count("F")), (pipe.transformer, len(PLAN))):
        calls.clear()
        with feature_cache(target, plan=PLAN):
            pictures.append(case.run(pipe))
        assert len(calls) == count
    assert torch.equal(*pictures)


def test_copies_skip_alike(case):
    pipe = case.make()
    apply_feature_cache(pipe, plan=PLAN)
    picture = case.run(pipe)
    copied = copy.deepcopy(pipe)
    assert torch.equal(case.run(copied), picture)
    remove_feature_cache(copied)
    assert torch.equal(case.run(pipe), picture) and not torch.equal(case.run(copied), picture)


def test_two_pipelines_share_a_flux_in_two_threads():
    pipe, other = make_pipeline("flux"), make_pipeline("flux")  # the host's tokenizers serve one thread at a time
    other.transformer = pipe.transformer
    apply_feature_cache(pipe, plan=StepPlan(PLAN, (1.0, 0.8, 0.6, 0.5, 0.3, 0.2)))
    steps = {pipe: 6, other: 9}
    expected = {each: generate(each, num_inference_steps=steps[each], **TRUE_GUIDANCE) for each in steps}
    found = {each: [] for each in steps}

    def run(each):
        for _ in range(3):
            found[each].append(generate(each, num_inference_steps=steps[each], **TRUE_GUIDANCE))

    threads = [threading.Thread(target=run, args=(each,)) for each in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, pictures in found.items():
        assert len(pictures) == 3 and all(torch.equal(picture, expected[each]) for picture in pictures)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_loop_of_ones_own(family, batch):
    model = make_transformer(family)
    report = apply_feature_cache(model, interval=2, branch="nothing")
    for timesteps in ((900.0, 700.0, 500.0, 300.0), (100.0, 300.0, 500.0, 700.0)):  # rising ones too
        with generation(model):
            for timestep in timesteps:
                call(model, 8, 6, batch=batch, timestep=timestep)
        assert kinds(report) == "FsFs"
        assert report.steps[0].noise_level == pytest.approx(timesteps[0] / 1000, abs=1e-3)
