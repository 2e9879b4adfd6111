"""What holds for everything that can be switched on: one list of features, one list of what may happen to them.

One long file on purpose: every feature meets every test.
"""

import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from cache_tools import forwards
from conftest import INPUTS, generate, hooks, level_of, make_pipeline, saved_and_loaded

from tomesd_plus import (
    ToMeProcessor,
    apply_feature_cache,
    apply_preset,
    apply_token_merging,
    feature_cache,
    generation,
    preset,
    remove_feature_cache,
    remove_preset,
    remove_token_merging,
    token_merging,
    tomesd,
)


@dataclass
class Feature:
    """Something that can be switched on.

    Args:
        on, off: Functions of a pipeline.
        inside: The same as a context manager; ``None`` if it has none.
        absent: What the warning says where there is nothing to switch off; ``None`` if nobody warns.
        caches: It is a feature cache or has one.
        twice: What happens when it is switched on twice: it is refused, or what is on is replaced.
    """

    on: Callable[[Any], Any]
    off: Callable[[Any], Any]
    inside: Callable[[Any], AbstractContextManager[Any]] | None = None
    absent: str | None = "token merging is not applied, so there is nothing to remove"
    caches: bool = False
    twice: str = "refused"


def merging(**options):
    return Feature(
        lambda pipe: apply_token_merging(pipe, max_downsample=level_of(pipe), **options),
        remove_token_merging,
        lambda pipe: token_merging(pipe, max_downsample=level_of(pipe), **options),
    )


def cache(**options):
    return Feature(
        lambda pipe: apply_feature_cache(pipe, **options),
        remove_feature_cache,
        lambda pipe: feature_cache(pipe, **options),
        absent="no feature cache is applied, so there is nothing to remove",
        caches=True,
    )


LAYERS = ["self_attention", "cross_attention", "mlp"]
FEATURES = {
    "bare processor": Feature(
        lambda pipe: pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5, max_downsample=level_of(pipe))),
        remove_token_merging,
        twice="replaced",
    ),
    "merging": merging(ratio=0.5),
    "merging all layers, full steps": merging(ratio=0.5, layers=LAYERS, full_steps=2, plan_every=2),
    "whole blocks": merging(ratio=0.5, layers="block", full_steps=3),
    "cache": cache(interval=2),
    "cache, forecast": cache(interval=2, forecast=1.0, branch=1),
    "adaptive cache": cache(interval=3, threshold=2.0),
    "attention cache": cache(interval=2, branch="self_attention"),
    "skipped calls": cache(branch="nothing", full_steps=(0, 1, 3)),
    "plan": cache(plan="FFSCFSC", forecast=1.0),
    "preset": Feature(
        lambda pipe: apply_preset(pipe, "fast", force=True),
        remove_preset,
        lambda pipe: preset(pipe, "fast", force=True),
        caches=True,
        absent="a preset is not applied, so there is nothing to remove",
    ),
    "drop-in": Feature(
        lambda pipe: tomesd.apply_patch(pipe, ratio=0.5, max_downsample=level_of(pipe), use_rand=False),
        tomesd.remove_patch,
        absent=None,  # as tomesd's
        twice="replaced",
    ),
}


@pytest.fixture(params=FEATURES, ids=lambda name: name.replace(" ", "-"))
def feature(request):
    return FEATURES[request.param]


def reports(returned):
    """The reports of merging and of a cache in what switching on has returned, if there are any."""
    parts = [getattr(returned, "merging", returned), getattr(returned, "cache", None)]
    return [part for part in parts if hasattr(part, "steps")]


def at_work(report):
    return report.merged if hasattr(report, "merged") else report.full < len(report.steps)


def traces(pipe):
    """Whatever switching something on may change in a pipeline."""
    own = [name for module in pipe.unet.modules() for name in vars(module) if "tomesd_plus" in name]
    processors = {name: type(processor) for name, processor in pipe.unet.attn_processors.items()}
    return hooks(pipe), set(vars(pipe.unet)), forwards(pipe), own, processors


def test_on_and_off(feature, any_pipe):
    """It changes the picture, the same way each time; nothing stays when it goes."""
    before, processors, weights = traces(any_pipe), any_pipe.unet.attn_processors, list(any_pipe.unet.state_dict())
    plain = generate(any_pipe)
    told = reports(feature.on(any_pipe))
    assert all("has not run yet" in str(report) for report in told)
    first, second = generate(any_pipe), generate(any_pipe)
    assert torch.equal(first, second) and not torch.equal(first, plain)
    assert all(at_work(report) for report in told) and hooks(any_pipe) != before[0]
    assert list(any_pipe.unet.state_dict()) == weights
    if feature.caches:
        assert forwards(any_pipe) and told[-1].kept_bytes
    feature.off(any_pipe)
    assert torch.equal(generate(any_pipe), plain) and traces(any_pipe) == before
    assert not before[2] and not before[3]
    if feature is not FEATURES["bare processor"]:  # which has taken the places of those that were there
        assert all(any_pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert all(at_work(report) and not report.kept_bytes for report in told)  # they still tell of what was


def test_each_does_something_of_its_own(any_pipe):
    pictures = {}
    for name, feature in (FEATURES | {"without the forecast": cache(interval=2, branch=1)}).items():
        if name != "bare processor":  # which does what merging does
            feature.on(any_pipe)
            pictures[name] = generate(any_pipe, num_inference_steps=8)
            feature.off(any_pipe)
    for one, other in combinations(pictures, 2):
        assert not torch.equal(pictures[one], pictures[other]), (one, other)


def test_on_twice(feature, pipe):
    feature.on(pipe)
    once = generate(pipe)
    if feature.twice == "refused":  # with other options too, and on the UNet alone
        for other in FEATURES.values():
            if other.off is feature.off and other.twice == "refused":
                for model in (pipe, pipe.unet):
                    with pytest.raises(ValueError, match="already applied"):
                        other.on(model)
    else:
        feature.on(pipe)
    assert torch.equal(generate(pipe), once)


@pytest.mark.parametrize("when", ["never on", "off already"])
def test_off_where_nothing_is_on(feature, when, pipe):
    plain = generate(pipe)
    if when == "off already":
        feature.on(pipe)
        feature.off(pipe)
    if feature.absent:
        with pytest.warns(UserWarning, match=feature.absent):
            feature.off(pipe)
    else:
        assert feature.off(pipe) is pipe
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("feature", [name for name in FEATURES if FEATURES[name].inside], indirect=True)
def test_inside_a_with_block(feature, pipe):
    plain, before = generate(pipe), traces(pipe)
    for _ in range(2):
        with pytest.raises(KeyError, match="in the block"), feature.inside(pipe) as report:
            assert not torch.equal(generate(pipe), plain) and all(map(at_work, reports(report))) and reports(report)
            raise KeyError("in the block")
        assert torch.equal(generate(pipe), plain) and traces(pipe) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["step 0", "step 1", "step 2", "between steps"])
def test_a_failure_in_mid_run(feature, error, where, pipe):
    before = traces(pipe)
    told = reports(feature.on(pipe))
    expected = generate(pipe)
    calls = []

    def fail(layer, args):
        calls.append(layer)
        if where == f"step {len(calls) - 1}":
            raise error("in the middle")

    def fail_between(pipe, step, timestep, tensors):
        if where == "between steps" and step == 1:
            raise error("in the middle")
        return tensors

    layer = pipe.unet.up_blocks[-1].attentions[-1].transformer_blocks[0].ff  # runs on cached steps too
    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(error, match="in the middle"):
        generate(pipe, seed=1, callback_on_step_end=fail_between)
    handle.remove()
    if where == "between steps":
        assert all(len(report.steps) == 2 for report in told)
    assert torch.equal(generate(pipe), expected)
    feature.off(pipe)
    assert traces(pipe) == before


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("when", ["before the first call", "after a generation", "in the middle of one"])
def test_copies(feature, how, when, pipe):
    """A copy goes on by itself, has nothing of the original's generation or layers, and can be switched off."""
    plain = generate(pipe)
    feature.on(pipe)
    copies = [copy.copy(pipe), copy.copy(pipe)]

    def make_copies():
        for other in copies:
            other.unet = copy.deepcopy(pipe.unet) if how == "deepcopy" else pickle.loads(pickle.dumps(pipe.unet))
        return {}

    if when == "before the first call":
        make_copies()
    expected = generate(pipe)
    if when == "after a generation":
        make_copies()
    elif when == "in the middle of one":
        generate(pipe, callback_on_step_end=lambda pipe, index, timestep, kwargs: make_copies() if index == 1 else {})
    assert torch.equal(generate(copies[0]), expected)
    feature.off(copies[0])
    assert torch.equal(generate(copies[0]), plain)
    assert torch.equal(generate(pipe), expected)
    feature.off(pipe)
    assert torch.equal(generate(pipe), plain)
    for parameter in pipe.unet.parameters():
        parameter.data.zero_()
    assert torch.equal(generate(copies[1]), expected)
    feature.off(copies[1])
    assert torch.equal(generate(copies[1]), plain)


def test_saving_and_loading(feature, pipe, tmp_path):
    """What is saved is the untouched model."""
    plain = generate(pipe)
    feature.on(pipe)
    assert not torch.equal(generate(pipe), plain)
    assert torch.equal(generate(saved_and_loaded(pipe, tmp_path)), plain)


def test_two_threads(feature, pipe):
    """Two pipelines of the same components, with a scheduler each, give in two threads what they give in turn.

    And with a tokenizer each: transformers' keep the padding of the latest call, so untouched pipelines that share one
    now and then give other pictures in two threads.
    """
    feature.on(pipe)
    steps, seeds = {0: 4, 1: 6}, range(2)  # out of step with each other
    in_turn = {seed: generate(pipe, seed, num_inference_steps=steps[seed]) for seed in seeds}
    made: dict[int, list[Any]] = {seed: [] for seed in seeds}
    start = threading.Barrier(2)

    def run(seed):
        own = type(pipe)(**pipe.components, requires_safety_checker=False)
        own.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        own.tokenizer = copy.deepcopy(pipe.tokenizer)
        own.set_progress_bar_config(disable=True)
        start.wait()
        made[seed] += [generate(own, seed, num_inference_steps=steps[seed]) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {seed: [torch.equal(each, in_turn[seed]) for each in made[seed]] for seed in seeds} == {
        seed: [True] * 4 for seed in seeds
    }


def test_the_drop_ins_random_numbers_in_two_threads(pipe):
    """Each thread draws as a fresh patch in one thread does: from a copy of the global generator."""
    torch.manual_seed(3)
    tomesd.apply_patch(pipe, ratio=0.5)
    expected = [generate(pipe), generate(pipe)]
    assert not torch.equal(*expected)
    tomesd.apply_patch(pipe, ratio=0.5)
    torch.manual_seed(3)
    made: list[list[Any]] = [[], []]

    def run(index):
        own = copy.copy(pipe)
        own.scheduler = copy.deepcopy(pipe.scheduler)
        made[index] += [generate(own), generate(own)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for pictures in made for one, other in zip(pictures, expected, strict=True))


@pytest.mark.parametrize("first", ["the feature", "the hook"])
def test_a_foreign_hook(feature, first, pipe):
    """Somebody else's hooks run, whoever came first, and stay when the feature goes."""
    seen = []

    def hook_in():
        return [
            pipe.unet.register_forward_pre_hook(lambda *args: seen.append("before")),
            pipe.unet.register_forward_hook(lambda *args: seen.append("after")),
        ]

    if first == "the hook":
        hook_in()
    feature.on(pipe)
    if first == "the feature":
        hook_in()
    with_hook = generate(pipe)
    assert seen == ["before", "after"] * 4
    feature.off(pipe)
    seen.clear()
    plain = generate(pipe)
    assert seen == ["before", "after"] * 4 and not torch.equal(plain, with_hook)
    assert hooks(pipe) == [""]


def test_the_same_call_gives_the_same_picture_whatever_ran_before(feature, any_pipe):
    """A picture does not depend on what was made before it, by this pipeline or another."""
    told = reports(feature.on(any_pipe))
    first = generate(any_pipe, seed=3, num_inference_steps=8)
    assert all(at_work(report) for report in told) and first.isfinite().all()
    generate(any_pipe, seed=4, num_inference_steps=3)
    generate(any_pipe, prompt=["a cat", "a dog"])
    generate(make_pipeline("sd"))
    if "Img2Img" not in type(any_pipe).__name__ and "ControlNet" not in type(any_pipe).__name__:
        generate(any_pipe, height=48, width=24)
    generate(any_pipe, num_inference_steps=2)
    torch.rand(7)  # the global generator is nobody's business
    assert torch.equal(generate(any_pipe, seed=3, num_inference_steps=8), first)


def test_other_sizes_and_batches(feature, pipe):
    """A picture in the middle of others is that of a model on which it is the first."""
    calls = [{}, {"height": 48, "width": 32}, {"prompt": ["a cat", "a"]}, {"guidance_scale": 1.0}, {}]
    feature.on(pipe)
    in_turn = [generate(pipe, **call) for call in calls]
    for call, picture in zip(calls, in_turn, strict=True):
        feature.off(pipe)
        feature.on(pipe)
        assert torch.equal(generate(pipe, **call), picture)


@torch.no_grad()
def test_generations_by_hand(feature, pipe):
    """Two loops in turn, one of which begins in the middle of the schedule, as if each ran by itself."""
    unet, text = pipe.unet, INPUTS["encoder_hidden_states"]
    samples = [INPUTS["sample"], INPUTS["sample"].flip(-1)]
    schedules = [(901, 801, 701, 601), (500, 400, 300, 200)]
    expected = []
    for sample, timesteps in zip(samples, schedules, strict=True):
        feature.on(pipe)
        expected.append([unet(sample, timestep, text).sample for timestep in timesteps])
        feature.off(pipe)
    feature.on(pipe)
    unet(samples[1], 950, text)  # a generation outside of both, which is left and taken up again
    scopes = [generation(pipe), generation(pipe)]
    made: list[list[Any]] = [[], []]
    for place in range(4):
        for index in range(2):
            with scopes[index]:
                made[index].append(unet(samples[index], schedules[index][place], text).sample)
    assert [[torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(made, expected)] == [
        [True] * 4
    ] * 2


@torch.no_grad()
def test_the_timesteps_of_a_generation_by_hand_may_rise(pipe):
    """As in DDIM inversion."""
    report = apply_feature_cache(pipe, interval=2)
    merged = apply_token_merging(pipe, ratio=0.5, full_steps=2)
    with generation(pipe) as scope:
        for timestep in (100, 300, 500, 700):
            pipe.unet(INPUTS["sample"], timestep, INPUTS["encoder_hidden_states"])
        with pytest.raises(RuntimeError, match="under way"), scope:
            pass
    assert [step.full for step in report.steps] == [True, False, True, False]
    assert [bool(step.removed) for step in merged.steps] == [False, True, False, True]
    with pytest.raises(TypeError, match="UNet"):
        generation(make_pipeline("sd").vae)


RISING = {
    "views": lambda t: list(t)[::-1],
    "a schedule turned round": lambda t: list(t.flip(0)),
    "numbers": lambda t: [int(each) for each in reversed(t)],
}


@torch.no_grad()
@pytest.mark.parametrize("form", RISING.values(), ids=RISING)
def test_inversion_and_at_once_sampling(feature, form, pipe):
    """Each as a scope around it would give it, from the first time on."""
    text = INPUTS["encoder_hidden_states"]
    pipe.scheduler.set_timesteps(5)
    down = pipe.scheduler.timesteps
    down = [int(each) for each in down] if form is RISING["numbers"] else list(down)
    up = form(pipe.scheduler.timesteps)

    def run(sample, timesteps, sign):
        for timestep in timesteps:
            sample = sample + sign * pipe.unet(sample, timestep, text).sample
        return sample

    plain = run(INPUTS["sample"], up, 0.1)
    told = reports(feature.on(pipe))
    with generation(pipe):
        inverted = run(INPUTS["sample"], up, 0.1)
    with generation(pipe):
        expected = run(inverted, down, -0.1)
    assert not torch.equal(inverted, plain) and all(at_work(report) for report in told)
    for _ in range(2):
        assert torch.equal(run(INPUTS["sample"], up, 0.1), inverted)
        assert all(len(report.steps) == 5 for report in told)
        assert torch.equal(run(inverted, down, -0.1), expected)
        assert all(len(report.steps) == 5 for report in told)
