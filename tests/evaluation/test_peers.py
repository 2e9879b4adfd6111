"""The peers that comparisons show beside this package's own settings."""

import pytest
import torch
from conftest import generate, make_pipeline
from diffusers import DPMSolverMultistepScheduler
from diffusers.schedulers import AysSchedules

from tomesd_plus.evaluation.configurations import parse_configuration
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.generation import Sampling, compare, peers_of


@pytest.fixture
def dpm():
    pipe = make_pipeline("sd")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def test_align_your_steps_are_the_timesteps_inside_and_not_after(dpm):
    plain, seen = generate(dpm, num_inference_steps=10), []
    hook = dpm.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(int(args[1])), with_kwargs=True)
    with parse_configuration("ays: , steps: 10").switched_on(dpm):
        picture = generate(dpm, num_inference_steps=10)
        with pytest.raises(EvaluationError, match="has 10 steps, not 11: set steps"):
            generate(dpm, num_inference_steps=11)
    hook.remove()
    assert seen == AysSchedules["StableDiffusionTimesteps"] and not torch.equal(picture, plain)
    assert torch.equal(generate(dpm, num_inference_steps=10), plain)


def test_sdxl_has_timesteps_of_its_own():
    pipe, seen = make_pipeline("sdxl"), []
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(int(args[1])), with_kwargs=True)
    with parse_configuration("ays: , steps: 3").switched_on(pipe):
        generate(pipe, num_inference_steps=3)
    assert seen == AysSchedules["StableDiffusionXLTimesteps"][:3]


def test_a_scheduler_without_timesteps_is_refused(pipe):
    with pytest.raises(EvaluationError, match="takes no timesteps"), parse_configuration("ays: ").switched_on(pipe):
        pass


def test_peers_skip_calls_and_align_their_steps(dpm, pipe):
    names = [peer.name for peer in peers_of(dpm, 12, [0.5], cache_interval=3)]
    assert "Align Your Steps, 10 steps" in names and "1 of 3 calls, linear" in names
    assert not any("Align" in peer.name for peer in [*peers_of(dpm, 10, [0.5]), *peers_of(pipe, 12, [0.5])])
    peers = [peer for peer in peers_of(dpm, 11, [0.5]) if "calls" in peer.name or "Align" in peer.name]
    rows = compare(dpm, ["a"], peers, Sampling(11, 1.0, 64, 64), equal_time=False).rows
    assert [row.steps for row in rows] == [11, 11, 10]
    assert len({round(row.psnr[0], 6) for row in rows}) == 3 and all(row.psnr[0] < 100 for row in rows)
