"""The feature cache in loops of a caller's own: where one picture ends and another begins, no pipeline says."""

from contextlib import nullcontext

import pytest
import torch
from cache_tools import TEXT, kinds, noise
from conftest import generate, make_pipeline, make_unet
from diffusers import DDIMScheduler

from tomesd_plus import apply_feature_cache, apply_token_merging

OTHER_TEXT = TEXT.flip(1)


def schedule(steps=6):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


def cached_unet():
    unet = make_unet()
    return unet, apply_feature_cache(unet, interval=2)


def run(unet, timesteps, seed=0, text=TEXT, sign=-0.1):
    """Latents after each step; a number for the seed, or latents to begin with."""
    sample, made = seed if isinstance(seed, torch.Tensor) else noise(seed), []
    for timestep in timesteps:
        with torch.no_grad():
            sample = sample + sign * unet(sample, timestep, text).sample
        made.append(sample)
    return made


def of_a_fresh_unet(*arguments, **options):
    return run(cached_unet()[0], *arguments, **options)


def same(made, expected):
    return len(made) == len(expected) and all(map(torch.equal, made, expected))


# Upwards ------------------------------------------------------------------------------------------------------------

UPWARDS = {
    "indices counted down": lambda t: [t[len(t) - 1 - i] for i in range(len(t))],
    "a list turned round": lambda t: list(t)[::-1],
    "expanded to the batch": lambda t: [each.expand(2) for each in list(t)[::-1]],
    "one-element slices": lambda t: [t[i : i + 1] for i in reversed(range(len(t)))],
    "reversed": lambda t: list(reversed(t)),
    "flip": lambda t: list(t.flip(0)),
    "a copy at each step": lambda t: [t.clone()[i] for i in reversed(range(len(t)))],
    "numbers": lambda t: [int(each) for each in reversed(t)],
}


@pytest.mark.parametrize("upwards", UPWARDS.values(), ids=UPWARDS)
def test_inversion_is_one_generation(upwards):
    unet, report = cached_unet()
    timesteps = schedule()
    first = run(unet, upwards(timesteps), sign=0.1)
    assert kinds(report) == "FcFcFc"
    assert same(run(unet, upwards(timesteps), sign=0.1), first) and kinds(report) == "FcFcFc"
    made = run(unet, upwards(timesteps), 1, OTHER_TEXT, 0.1)
    assert kinds(report) == "FcFcFc" and same(made, of_a_fresh_unet(upwards(timesteps), 1, OTHER_TEXT, 0.1))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("upwards", UPWARDS.values(), ids=UPWARDS)
@pytest.mark.parametrize("steps", [2, 5])
def test_inversion_and_at_once_sampling_are_a_generation_each(upwards, steps, inference):
    with torch.inference_mode(inference):
        timesteps = schedule(steps)
        downwards = [int(t) for t in timesteps] if upwards is UPWARDS["numbers"] else timesteps
        unet, report = cached_unet()
        for _ in range(2):
            inverted = run(unet, upwards(timesteps), sign=0.1)
            assert kinds(report) == "FcFcF"[:steps]
            made = run(unet, downwards, inverted[-1])
            assert kinds(report) == "FcFcF"[:steps]
            assert same(made, of_a_fresh_unet(downwards, inverted[-1]))


def test_null_text_inversion_with_another_text_at_each_step():
    unet, report = cached_unet()
    sample, timesteps = noise(), schedule()
    with torch.no_grad():
        for number, timestep in enumerate(timesteps):
            sample = sample - 0.1 * unet(sample, timestep, TEXT + 0.01 * number).sample
    assert kinds(report) == "FcFcFc"


# Where another generation stopped -----------------------------------------------------------------------------------

FORMS = {
    "views": list,
    "numbers": lambda t: [int(each) for each in t],
    "tensors": lambda t: [t[i].clone() for i in range(len(t))],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("text", [TEXT, OTHER_TEXT], ids=["same text", "another text"])
def test_a_generation_that_begins_where_another_stopped(form, text):
    unet, report = cached_unet()
    timesteps = form(schedule())
    for _ in range(2):
        run(unet, timesteps[:3])
        made = run(unet, timesteps[2:], 1, text)
        assert kinds(report) == "FcFc" and same(made, of_a_fresh_unet(timesteps[2:], 1, text))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("after", ["within the call", "after the call"])
def test_the_same_after_a_failure(form, after):
    unet, report = cached_unet()
    timesteps = form(schedule())
    for stop in (1, 2, 3):
        run(unet, timesteps[:stop])
        handle = unet.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)
        if after == "within the call":
            with pytest.raises(ZeroDivisionError):
                run(unet, timesteps[stop : stop + 1], 0)
        handle.remove()
        first = stop if after == "within the call" else stop - 1
        made = run(unet, timesteps[first:], 1)
        expected = of_a_fresh_unet(timesteps[first:], 1)
        assert torch.equal(made[0], expected[0])
        if first:
            assert same(made, expected) and kinds(report) == "FcFcFc"[: len(expected)]


@pytest.mark.parametrize(("seed", "text"), [(1, TEXT), (0, OTHER_TEXT), (1, OTHER_TEXT)])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_generation_after_another_ones_first_step(form, seed, text):
    """Nothing tells yet how often a step calls; what it takes later is its own in any case."""
    unet, report = cached_unet()
    timesteps = form(schedule())
    run(unet, timesteps[:1])
    made = run(unet, timesteps, seed, text)
    plain = run(make_unet(), timesteps, seed, text)
    assert torch.equal(made[0], plain[0])
    if same(made, of_a_fresh_unet(timesteps, seed, text)):
        assert kinds(report) == "FcFcFc"
    else:
        assert kinds(report) == "FcFcF" and torch.equal(made[1], plain[1])


def branches(unet, timesteps, seed, texts=(TEXT, OTHER_TEXT), calls=1000):
    """Guidance, a call a branch, each with a tensor of its own."""
    sample, made = noise(seed), []
    for timestep in timesteps:
        outputs = []
        for text in texts:
            if calls == 0:
                return made
            with torch.no_grad():
                outputs.append(unet(sample.clone(), timestep, text).sample)
            calls -= 1
        sample = sample - 0.1 * torch.lerp(*outputs, 2.0)
        made.append(sample)
    return made


@pytest.mark.parametrize("calls", [3, 4, 5, 6])
def test_guidance_by_branches_that_begins_where_another_stopped(calls):
    unet, report = cached_unet()
    timesteps = schedule()
    branches(unet, timesteps, 0, calls=calls)
    begin = (calls - 1) // 2
    made = branches(unet, timesteps[begin:], 1)
    assert kinds(report) == "FFccFFccFFcc"[: 2 * len(made)]
    assert same(made, branches(cached_unet()[0], timesteps[begin:], 1))


def test_branches_with_the_same_latents_and_text_are_branches():
    """As of perturbed attention, by timesteps of one's own: the first step does not show it, the second does."""
    unet, report = cached_unet()
    for _ in range(2):
        sample = noise()
        with torch.no_grad():
            for timestep in (900.0, 700.0, 500.0, 300.0):
                outputs = [unet(sample, torch.tensor([timestep]), TEXT).sample for _ in range(2)]
                sample = sample - 0.1 * sum(outputs)
        assert kinds(report) == "FFccFF"


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_two_pictures_step_by_step_get_nothing_of_each_other(form):
    alone = [run(make_unet(), form(schedule()), seed) for seed in range(2)]
    cached = [of_a_fresh_unet(form(schedule()), seed) for seed in range(2)]
    unet, _ = cached_unet()
    samples, timesteps = [noise(0), noise(1)], form(schedule())
    expected = cached if form is FORMS["views"] else alone  # of values alone nothing says that more steps come
    told = nullcontext() if form is FORMS["views"] else pytest.warns(UserWarning, match="a generation of one step")
    with told, torch.no_grad():
        for number, timestep in enumerate(timesteps):
            for place in range(2):
                samples[place] = samples[place] - 0.1 * unet(samples[place], timestep, TEXT).sample
                assert torch.equal(samples[place], expected[place][number])


# Static buffers and pieces of batches -------------------------------------------------------------------------------

SLOTS = {
    "0-d": lambda: torch.zeros(()),
    "one element": lambda: torch.zeros(1),
    "one for each sample": lambda: torch.zeros(2),
    "expanded": lambda: torch.zeros(1).expand(2),
    "a place in a pool": lambda: torch.arange(8.0)[3],
    "a slice of a pool": lambda: torch.arange(8.0)[3:4],
    "a place in a pool, expanded": lambda: torch.arange(8.0)[3].expand(2),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("slot", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("upwards", [False, True])
def test_static_buffers(slot, upwards, inference):
    """As loops for CUDA graphs: latents, timestep and text are written over for each step."""
    timesteps = [int(t) for t in schedule()][:: -1 if upwards else 1]
    with torch.inference_mode(inference):
        buffers = torch.empty(2, 4, 16, 16), slot(), torch.empty_like(TEXT)
        unet, report = cached_unet()
        merging = apply_token_merging(unet, ratio=0.5)
        for seed, text in ((0, TEXT), (0, TEXT), (1, OTHER_TEXT)):
            sample, made = noise(seed), []
            for timestep in timesteps:
                buffers[0].copy_(sample)
                (buffers[1][:1] if buffers[1].ndim and not buffers[1].stride(0) else buffers[1]).fill_(timestep)
                buffers[2].copy_(text)
                with torch.no_grad():
                    sample = sample - 0.1 * unet(*buffers).sample
                made.append(sample)
            assert kinds(report) == "FcFcFc" and merging.merged
            fresh = cached_unet()[0]
            apply_token_merging(fresh, ratio=0.5)
            assert same(made, run(fresh, timesteps, seed, text))


def test_a_schedule_in_a_static_buffer():
    unet, report = cached_unet()
    buffer = torch.empty_like(schedule())
    for seed in (0, 0, 1):
        buffer.copy_(schedule())
        made = run(unet, buffer, seed)
        assert kinds(report) == "FcFcFc" and same(made, of_a_fresh_unet(schedule(), seed))


@pytest.mark.parametrize("cut", [lambda t: t.chunk(2), lambda t: [t[0:1], t[1:2]], lambda t: [t[0], t[1]]])
def test_pieces_of_a_batchs_timesteps_are_read_by_value(cut):
    """Two pictures of one batch, one after the other at each step: pieces of one tensor are no schedule."""
    unet, report = cached_unet()
    sample = noise(batch=1).repeat(2, 1, 1, 1)
    with torch.no_grad():
        for value in (900, 700, 500, 300):
            pieces = [
                unet(sample[i : i + 1], timestep, TEXT[i : i + 1]).sample
                for i, timestep in enumerate(cut(torch.full((2,), value)))
            ]
            sample = sample - 0.1 * torch.cat(pieces)
    assert {step.index for step in report.steps} == {None}
    assert [round(step.noise_level * 999) for step in report.steps][-2:] == [300, 300]


@torch.no_grad()
@pytest.mark.parametrize("form", ["value", "view"])
def test_beyond_a_jump_other_latents_are_another_pictures_whatever_the_text(form):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    first, later = (999, 500) if form == "value" else (scheduler.timesteps[0], scheduler.timesteps[5])
    unet = make_unet()
    report = apply_feature_cache(unet, interval=3)
    unet(noise(seed=1), first, TEXT)
    picture = unet(noise(seed=2), later, TEXT.clone()).sample
    assert kinds(report) == "F" and torch.equal(picture, make_unet()(noise(seed=2), later, TEXT).sample)


@pytest.mark.parametrize("strengths", [(0.1, 0.2, 0.3), (0.3, 0.2, 0.1), (0.5, 0.4)])
@pytest.mark.parametrize("options", [{"interval": 3}, {"interval": 2, "branch": "nothing"}])
def test_a_sweep_of_strengths_is_a_generation_each(options, strengths):
    """The next one may begin a step before or after the place where this one began, with latents that are alike."""
    pipe, call = make_pipeline("img2img"), {"num_inference_steps": 10, "image": torch.rand(1, 3, 32, 32)}
    expected = []
    for strength in strengths:
        fresh = make_pipeline("img2img")
        apply_feature_cache(fresh, **options)
        expected.append(generate(fresh, strength=strength, **call))
    report = apply_feature_cache(pipe, **options)
    for strength, picture in zip(strengths, expected, strict=True):
        assert torch.equal(generate(pipe, strength=strength, **call), picture)
        assert len(report.steps) == round(10 * strength)
