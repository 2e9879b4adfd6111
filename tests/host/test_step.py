import copy
import pickle

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from tomesd_plus.host.noise_level import NoiseLevels
from tomesd_plus.host.step import StepTracker


class Pipe:
    """What has a scheduler."""

    def __init__(self, scheduler):
        self.scheduler = scheduler


SAMPLE = torch.zeros(2, 4, 16, 24)


@pytest.mark.parametrize(
    "scheduler_class", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler]
)
def test_it_follows_a_scheduler_over_two_generations(scheduler_class):
    scheduler = scheduler_class()
    tracker = StepTracker()
    for _ in range(2):
        scheduler.set_timesteps(5)
        steps = [tracker.observe(SAMPLE, t) for t in scheduler.timesteps]
        assert [step.index for step in steps] == list(range(len(scheduler.timesteps)))
        assert [step.noise_level for step in steps] == pytest.approx([t.item() / 999 for t in scheduler.timesteps])
        assert [step.new_generation for step in steps] == [True] + [False] * (len(steps) - 1)
        assert (steps[0].height, steps[0].width, steps[0].batch) == (16, 24, 2)


def test_one_step_generations_are_told_apart():
    scheduler, tracker = DDIMScheduler(), StepTracker()
    for _ in range(3):
        scheduler.set_timesteps(1)
        assert tracker.observe(SAMPLE, scheduler.timesteps[0]).new_generation


def test_timesteps_from_the_middle_as_img2img_has_them():
    scheduler, tracker = DDIMScheduler(), StepTracker()
    scheduler.set_timesteps(10)
    steps = [tracker.observe(SAMPLE, t) for t in scheduler.timesteps[4:]]
    assert [step.index for step in steps] == [4, 5, 6, 7, 8, 9]
    assert steps[0].noise_level == pytest.approx(scheduler.timesteps[4].item() / 999)


@pytest.mark.parametrize("form", [int, float, torch.tensor, lambda t: torch.full((2,), t)])
def test_timesteps_of_the_callers_own(form):
    tracker = StepTracker()
    steps = [tracker.observe(SAMPLE, form(t)) for t in (999, 500, 0, 999)]
    assert [round(step.noise_level, 3) for step in steps] == [1.0, 0.501, 0.0, 1.0]
    assert [step.new_generation for step in steps] == [True, False, False, True]
    assert {step.index for step in steps} == {None}


def test_it_survives_inference_mode_copies_and_pickling():
    scheduler, tracker = DDIMScheduler(), StepTracker()
    with torch.inference_mode():
        scheduler.set_timesteps(4)
        assert tracker.observe(SAMPLE, scheduler.timesteps[1]).index == 1
    for twin in (copy.deepcopy(tracker), pickle.loads(pickle.dumps(tracker))):
        step = twin.observe(SAMPLE, scheduler.timesteps[2])  # goes on, by a schedule of the same timesteps
        assert (step.index, step.number, step.new_generation) == (2, 1, False)
        assert twin.observe(SAMPLE, scheduler.timesteps[0]).new_generation


def test_other_lengths_of_training():
    pipe = Pipe(DDIMScheduler(501))
    assert StepTracker(NoiseLevels(pipe)).observe(SAMPLE, 500).noise_level == 1.0


@pytest.mark.parametrize("form", [int, float, torch.tensor, lambda t: torch.full((2,), t)])
def test_timesteps_that_rise(form):
    """As in DDIM inversion; then another picture's, and generation's fall."""
    torch.manual_seed(0)
    tracker, text = StepTracker(), torch.ones(2, 3, 4)
    first = torch.randn(2, 4, 16, 24)

    def new(sample, timesteps, text=text):
        return [tracker.observe(sample + 0.1 * k, form(t), text).new_generation for k, t in enumerate(timesteps)]

    assert new(first, (100, 300, 500, 700)) == [True, False, False, False]
    assert new(torch.randn_like(first), (100, 300, 500)) == [True, False, False]
    assert new(torch.randn_like(first), (900, 500, 100), text + 1) == [True, False, False]
    assert new(torch.randn_like(first), (900, 500, 100)) == [True, False, False]
    assert new(torch.randn_like(first), (500,), text.clone())[0]
    assert new(torch.randn_like(first), (600,), text.clone())[0], "another picture's one step"


def test_branches_at_one_timestep_are_one_step_and_other_latents_are_another_picture():
    """As Flux is called under true guidance: with a new tensor each time."""
    one, other = torch.zeros(1, 3, 4), torch.ones(1, 3, 4)
    torch.manual_seed(0)
    tracker, latents = StepTracker(), torch.randn(1, 4, 16, 24)
    calls = [(t, text) for t in (900.0, 500.0) for text in (one, other)]
    steps = [tracker.observe(latents, torch.tensor([t]), text) for t, text in calls]
    assert [(step.number, step.call, step.new_generation) for step in steps] == [
        (0, 0, True), (0, 1, False), (1, 0, False), (1, 1, False)
    ]  # fmt: skip
    assert tracker.observe(torch.randn_like(latents), torch.tensor([500.0]), other).new_generation
    assert tracker.observe(torch.randn_like(latents), torch.tensor([500.0]), one).new_generation


def test_other_text_begins_a_generation():
    """A loop that is left in its middle, and another picture's that begins further on."""
    one, other = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    tracker = StepTracker()
    torch.manual_seed(0)
    a, b = torch.randn_like(SAMPLE), torch.randn_like(SAMPLE)
    calls = [(a, 999, one), (a + 0.1, 900, one.clone()), (b, 500, other), (b, 400, other), (b, 300, other[:1])]
    steps = [tracker.observe(*call) for call in calls]
    assert [step.new_generation for step in steps] == [True, False, True, False, False]
    assert not tracker.observe(b + 0.1, 200, other - 1).new_generation, "the prompt was edited"
    scheduler, tracker = DDIMScheduler(), StepTracker()
    scheduler.set_timesteps(10)
    calls = [(0, one), (1, one), (2, other), (4, other), (7, one), (9, one)]
    steps = [tracker.observe(SAMPLE, scheduler.timesteps[index], text) for index, text in calls]
    assert [step.new_generation for step in steps] == [True, False, False, False, True, False]


@pytest.mark.parametrize("upwards", [False, True])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_ordinary_calls_read_nothing_from_the_device(upwards, calls):
    """One a step, or guidance branches of the same latents: where the schedule is known, no host waits."""
    scheduler, tracker = DDIMScheduler(), StepTracker()
    scheduler.set_timesteps(6)
    timesteps = list(scheduler.timesteps)[:: -1 if upwards else 1]
    texts = [torch.randn(1, 3, 4) for _ in range(calls)]
    latents = torch.randn(1, 4, 8, 8)

    def step(timestep):
        scaled = latents * 1.0  # as a scheduler's scale_model_input gives
        return [tracker.observe(scaled, timestep, text) for text in texts]

    steps = step(timesteps[0]) + step(timesteps[1])  # the second step shows the direction
    with NoReading():
        for timestep in timesteps[2:]:
            latents = latents * 0.99
            steps += step(timestep)
    assert [(each.number, each.call) for each in steps] == [(n, c) for n in range(6) for c in range(calls)]
    assert [each.new_generation for each in steps] == [True] + [False] * (6 * calls - 1)
    assert [each.last for each in steps[-calls:]] == [True] * calls


class NoReading(TorchDispatchMode):
    """Fails where a value is read from a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reading = torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal
        assert function.overloadpacket not in reading
        return function(*args, **(kwargs or {}))


def test_the_same_of_an_explicit_generation_where_nothing_is_guessed():
    scheduler, tracker = DDIMScheduler(), StepTracker(explicit=True)
    scheduler.set_timesteps(6)
    steps = [tracker.observe(torch.randn(1, 4, 8, 8), scheduler.timesteps[i]) for i in (2, 2, 5, 0, 1)]
    assert [(each.number, each.call) for each in steps] == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]
    assert [each.new_generation for each in steps] == [True, False, False, False, False]
