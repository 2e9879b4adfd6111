import copy
import pickle

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler

from tomesd_plus.host.step import StepTracker

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
        assert twin.observe(SAMPLE, scheduler.timesteps[2]).new_generation


def test_other_lengths_of_training():
    assert StepTracker(train_timesteps=501).observe(SAMPLE, 500).noise_level == 1.0
