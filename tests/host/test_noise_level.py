"""Noise levels of every kind of timestep."""

import copy
import math
import pickle
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import generate, make_pipeline

from tomesd_plus import IntervalSchedule, ToMeProcessor, apply_feature_cache, apply_token_merging
from tomesd_plus.host.noise_level import NoiseLevels
from tomesd_plus.host.step import StepTracker

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KARRAS = {**SD, "use_karras_sigmas": True}
CONTINUOUS = {**SD, "timestep_type": "continuous", "prediction_type": "v_prediction"}


class Pipe:
    def __init__(self, scheduler, steps=12):
        self.scheduler = scheduler
        scheduler.set_timesteps(steps)


def by_snr(sigma):
    """The level by linear search over Stable Diffusion's own table."""
    alphas = diffusers.DDIMScheduler(**SD).alphas_cumprod.double()
    logs = ((1 - alphas) / alphas).log() / 2
    nearest = (logs - math.log(sigma)).abs().argmin().item()
    return nearest / 999


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("EulerDiscreteScheduler", CONTINUOUS),
        ("EulerDiscreteScheduler", {**CONTINUOUS, "use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", KARRAS),
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", KARRAS),
        ("UniPCMultistepScheduler", KARRAS),
        ("HeunDiscreteScheduler", KARRAS),
        ("LMSDiscreteScheduler", SD),
    ],
)
def test_equal_log_snr_is_an_equal_noise_level(kind, options):
    scheduler = getattr(diffusers, kind)(**options)
    pipe = Pipe(scheduler)
    levels = NoiseLevels(pipe).of(scheduler.timesteps.tolist())
    expected = [by_snr(sigma) for sigma in scheduler.sigmas[: len(levels)].tolist()]
    assert levels == pytest.approx(expected, abs=2e-3) and max(levels) > 0.9
    one_by_one = [level for t in scheduler.timesteps.tolist() for level in NoiseLevels(pipe).of([t])]
    assert one_by_one == levels
    rounded = NoiseLevels(pipe).of(scheduler.timesteps.bfloat16().tolist())
    assert rounded == pytest.approx(levels, abs=0.02)


@pytest.mark.parametrize(
    "kind", ["DDIMScheduler", "PNDMScheduler", "LCMScheduler", "DPMSolverMultistepScheduler", "DDIMInverseScheduler"]
)
def test_integer_timesteps_are_those_of_training(kind):
    pipe = Pipe(getattr(diffusers, kind)(**SD))
    timesteps = pipe.scheduler.timesteps.tolist()
    assert NoiseLevels(pipe).of(timesteps) == [t / 999 for t in timesteps]
    assert NoiseLevels().of(timesteps) == [t / 999 for t in timesteps]
    assert NoiseLevels(pipe).of([617]) == [617 / 999]  # none of this schedule


def test_intermediate_timesteps_of_kdpm2():
    pipe = Pipe(diffusers.KDPM2DiscreteScheduler(**SD))
    timesteps = pipe.scheduler.timesteps.tolist()
    assert NoiseLevels(pipe).of(timesteps) == pytest.approx([t / 999 for t in timesteps])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
)
def test_flow_matching_has_its_sigmas(kind, options):
    pipe = Pipe(getattr(diffusers, kind)(**options))
    levels = NoiseLevels(pipe).of(pipe.scheduler.timesteps.tolist())
    assert levels == pytest.approx(pipe.scheduler.sigmas[: len(levels)].tolist())


def test_zero_snr_and_beyond_training():
    pipe = Pipe(diffusers.EulerDiscreteScheduler(**CONTINUOUS, rescale_betas_zero_snr=True))
    levels = NoiseLevels(pipe).of(pipe.scheduler.timesteps.tolist())
    assert levels[0] == 1.0 and levels == sorted(levels, reverse=True) and levels[1] < 1
    assert max(NoiseLevels(Pipe(diffusers.EDMEulerScheduler(sigma_max=500))).of([1.55])) <= 1


def test_the_scheduler_at_hand_is_asked_also_in_copies():
    pipe = make_pipeline("sd")
    report = apply_token_merging(pipe, ratio=0.5)
    pipe.scheduler = diffusers.EDMEulerScheduler()
    generate(pipe, steps=4)
    levels = [step.noise_level for step in report.steps]
    assert levels[0] == 1.0 and levels == sorted(set(levels), reverse=True)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        twin.scheduler.set_timesteps(4)
        (noise_levels,) = {
            hook.__self__ for hook in twin.unet._forward_pre_hooks.values() if hasattr(hook, "__self__")
        }
        assert noise_levels.noise_levels.of(twin.scheduler.timesteps.tolist()) == levels


def test_what_cannot_be_known_is_said_once_and_followed_by_place():
    pipe = make_pipeline("sd")
    pipe.scheduler = diffusers.EDMEulerScheduler()
    processor = ToMeProcessor()
    pipe.unet.set_attn_processor(processor)
    with pytest.warns(UserWarning, match=r"noise level of timestep 1\.09.* cannot be known.*no scheduler is known"):
        generate(pipe, steps=4)
    levels = [step.noise_level for step in processor.attachment.record.value.steps]
    assert levels == [1.0, 0.75, 0.5, 0.25]
    generate(pipe, steps=4)  # once


@pytest.mark.parametrize(
    "switch", [lambda unet: apply_token_merging(unet, 0.5), lambda unet: apply_feature_cache(unet)]
)
def test_nobody_is_warned_whose_settings_do_not_depend_on_it(switch):
    pipe = make_pipeline("sd")
    pipe.scheduler = diffusers.EDMEulerScheduler()
    switch(pipe.unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(pipe, steps=2)


def test_an_interval_schedule_follows_log_sigma_timesteps():
    pipe = make_pipeline("sd")
    pipe.scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_max=14.6, sigma_min=0.03)
    report = apply_feature_cache(pipe, IntervalSchedule((1, 4)))
    generate(pipe, steps=8)
    full = [step.full for step in report.steps]
    noisy = [step.full for step in report.steps if step.noise_level > 0.5]
    assert all(noisy) and not all(full)


def test_a_stand_in_for_a_pipeline():
    pipe = SimpleNamespace(scheduler=diffusers.EDMEulerScheduler())
    pipe.scheduler.set_timesteps(4)
    levels = NoiseLevels(pipe).of(pipe.scheduler.timesteps.tolist())
    assert levels[0] == 1.0 and levels == sorted(set(levels), reverse=True)


def test_flux_is_called_with_sigma_itself():
    pipe = Pipe(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    assert [level for sigma in sigmas for level in NoiseLevels(pipe).of([sigma])] == pytest.approx(sigmas)


def test_fractions_of_training_need_no_scheduler():
    """The first of a generation tells, also after one in log σ."""
    tracker, sample = StepTracker(NoiseLevels(needed=False)), torch.zeros(1, 4, 8, 8)
    assert tracker.observe(sample, 1.09).noise_level < 0.01
    for _ in range(2):
        levels = [tracker.observe(sample, t).noise_level for t in (999.0, 431.25, 3.7)]
        assert levels == [1.0, 431.25 / 999, 3.7 / 999]


def test_one_schedule_says_nothing_of_the_next():
    levels = NoiseLevels(needed=False)
    assert levels.of([999.0, 500.5, 3.5]) == [1.0, 500.5 / 999, 3.5 / 999]
    assert levels.of([1.09, 0.44, -1.55]) == [1.0, 1 - 1 / 3, 1 - 2 / 3]


def test_a_scheduler_of_the_users_own_has_no_config():
    pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor([900.0, 100.0])))
    assert NoiseLevels(pipe).of([900.0, 100.0]) == [900 / 999, 100 / 999]
