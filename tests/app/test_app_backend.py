"""The app's backend, without gradio: pictures, figures, code."""

import subprocess
import sys

import diffusers
import pytest
import torch
from app_tools import STEPS, picture, untouched
from conftest import generate, make_pipeline

from gradio_app import drawings, words
from gradio_app.backend import MAX_BASELINES, Backend
from gradio_app.settings import Candidate


@pytest.fixture
def backend(pipe):
    return Backend(pipe, "a/model")


def test_gradio_is_not_imported():
    code = (
        "import sys, gradio_app.backend, gradio_app.runs, gradio_app.words, gradio_app.drawings; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "gradio_app.backend" in loaded and "gradio" not in loaded


def test_a_comparison_has_both_pictures_and_their_figures(backend):
    result = backend.compare(picture(), Candidate(ratio=0.5, schedule="constant"))
    assert result.removed == {1: pytest.approx(0.5)}
    assert 5 < result.psnr < 100 and 0 < result.ssim < 1
    assert result.baseline.pixels.shape == result.merged.pixels.shape == (3, 32, 32)
    assert not torch.equal(result.baseline.pixels, result.merged.pixels)
    assert result.merged.seconds > 0 and result.merged.memory_mib > 0 and result.speedup > 0
    assert set(result.merge_maps) == {(step, 1) for step in range(STEPS)}
    assert result.merge_maps[0, 1].shape == (16, 16) and result.merge_maps[0, 1].max() > 1
    result = backend.compare(picture(steps=9), Candidate(preset="balanced"))
    assert (result.cached_steps, result.skipped_steps) == (3, 2)
    assert "Of 9 steps 3 were cached, 2 skipped." in words.finished([result], backend.device)
    assert words.numbers(result)["skipped_steps"] == 2
    assert untouched(backend.pipe)


def test_the_pictures_are_those_of_the_pipeline(backend):
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    before = generate(backend.pipe, **options)[0]
    result = backend.compare(picture(), Candidate())
    assert torch.equal(result.baseline.pixels, before)
    assert torch.equal(generate(backend.pipe, **options)[0], before)


def test_a_remembered_baseline_costs_no_second_picture(backend):
    calls = []
    first = backend.compare(picture(), Candidate(ratio=0.25), lambda *told: calls.append(told))
    assert first.warmed_up and not first.remembered and calls[-1][1:] == (2 * STEPS, 2 * STEPS)
    assert backend.remembers(picture()) and not backend.remembers(picture(seed=1))
    calls.clear()
    second = backend.compare(picture(), Candidate(ratio=0.5), lambda *told: calls.append(told))
    assert second.remembered and not second.warmed_up and calls[-1][1:] == (STEPS, STEPS)
    assert second.baseline is first.baseline and not torch.equal(second.merged.pixels, first.merged.pixels)


def test_every_kind_of_run_is_warmed_up_once(backend):
    told = []

    def warmed(candidate, **options):
        told.clear()
        result = backend.compare(picture(**options), candidate, lambda what, *_: told.append(what))
        assert result.warmed_up == any("warming up" in what for what in told)
        assert ("warm-up" in words.finished([result], "here")) == result.warmed_up
        return result.warmed_up

    assert warmed(Candidate(ratio=0)) and not warmed(Candidate(ratio=0), seed=1)
    assert warmed(Candidate(ratio=0.5)) and not warmed(Candidate(ratio=0.25))
    assert warmed(Candidate(ratio=0.25, cache_interval=2)) and not warmed(Candidate(ratio=0.5, cache_interval=3))
    assert warmed(Candidate(merged="whole blocks")) and warmed(Candidate(), width=40)


@pytest.mark.parametrize(
    ("scheduler", "steps"), [("PNDMScheduler", STEPS + 1), ("HeunDiscreteScheduler", 2 * STEPS - 1)]
)
def test_steps_are_those_of_the_scheduler(backend, scheduler, steps):
    options = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    backend.pipe.scheduler = getattr(diffusers, scheduler)(**options)
    told = []
    result = backend.compare(picture(), Candidate(), lambda what, *counts: told.append(counts))
    assert result.steps == steps and told[-1] == (2 * steps, 2 * steps)
    assert {step for step, _ in result.merge_maps} == set(range(steps))


@pytest.mark.parametrize(
    "change",
    [{"prompt": "a dog"}, {"negative_prompt": "a dog"}, {"seed": 1}, {"steps": 2}, {"guidance_scale": 1.0},
     {"width": 40}],
)  # fmt: skip
def test_whatever_a_baseline_depends_on_makes_another(backend, change):
    first = backend.compare(picture(), Candidate())
    second = backend.compare(picture(**change), Candidate())
    assert not second.remembered
    assert first.baseline.pixels.shape != second.baseline.pixels.shape or not torch.equal(
        first.baseline.pixels, second.baseline.pixels
    )


def test_few_baselines_are_remembered(backend):
    for seed in range(MAX_BASELINES + 2):
        backend.compare(picture(seed=seed, steps=1), Candidate(ratio=0))
    remembered = [backend.remembers(picture(seed=seed, steps=1)) for seed in range(MAX_BASELINES + 2)]
    assert remembered == [False, False, *[True] * MAX_BASELINES]


def test_without_merging_the_pictures_are_identical(backend):
    result = backend.compare(picture(), Candidate(ratio=0))
    assert result.psnr is None and result.ssim == pytest.approx(1) and not result.removed and not result.merge_maps
    assert "identical" in words.figures(result) and "token_merging" not in result.code


def test_presets_and_cache_tell_of_their_cached_steps(backend):
    for candidate, count in ((Candidate(ratio=0, cache_interval=3), 2), (Candidate(preset="balanced"), 1)):
        result = backend.compare(picture(), candidate)  # of three steps; a preset's last one is full
        assert result.cached_steps == count and result.psnr is not None
        assert any("is for 9 steps and more" in note for note in result.notes) == bool(candidate.preset)
        assert ("force=True" in result.code) == bool(candidate.preset)
    assert untouched(backend.pipe)


def test_sdxl_merges_where_it_has_attention():
    backend = Backend(make_pipeline("sdxl"))
    assert backend.limits.levels == (2,)
    result = backend.compare(picture(), Candidate(schedule="constant", max_downsample=2))
    assert result.removed == {2: pytest.approx(0.5)}
    with pytest.warns(UserWarning, match=r"merged nothing: .* set max_downsample=2"):
        nothing = backend.compare(picture(), Candidate(max_downsample=1))
    assert nothing.psnr is None and nothing.notes[0].startswith("Nothing was merged: ")
    assert "Nothing was merged" in words.finished([nothing], "here")


def test_explore_gives_a_result_for_each_candidate_and_one_baseline(backend):
    candidates = [Candidate(ratio=0.25), Candidate(ratio=0.75), Candidate(preset="quality"), Candidate(ratio=0)]
    results = backend.explore(picture(), candidates)
    assert [result.candidate for result in results] == candidates
    assert len({id(result.baseline) for result in results}) == 1
    assert results[0].psnr > results[1].psnr and results[0].removed[1] < results[1].removed[1]
    plot = drawings.scatter(results)
    assert plot.count("<circle") == 3 and all(name in plot for name in ("ratio 0.25", "ratio 0.75", "quality"))
