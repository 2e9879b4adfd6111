"""``tomesd-plus tune``, and what it writes wherever presets are taken; schedulers by name."""

import csv
from dataclasses import replace

import pytest
from conftest import make_pipeline
from PIL import Image
from typer.testing import CliRunner

from tomesd_plus import Preset, tune
from tomesd_plus.cli import app
from tomesd_plus.evaluation.configurations import parse_configuration
from tomesd_plus.evaluation.errors import ModelError
from tomesd_plus.evaluation.generation.schedulers import scheduler_by_name
from tomesd_plus.evaluation.names import SCHEDULERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_pipeline("sd").save_pretrained(path)
    return path


def test_tune_writes_presets_that_other_commands_take(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def cli(*arguments):
        result = CliRunner().invoke(app, [str(each) for each in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    common = ("--model", folder, "--steps", 6, "--size", 32, "--scheduler", "dpm++2m-karras")
    told = cli("tune", "a cat", "a", *common, "--speedup", 1.1, "--generations", 6)
    chosen = Preset.load("tuned/1.1x.json")
    assert (
        chosen.measured.scheduler.startswith("DPMSolverMultistepScheduler, Karras")
        and chosen.measured.steps == 6
        and "1.1x.json" in told
    )
    with open("tuned/table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["what"] == "1.1x.json" and float(rows[0]["speed-up"]) >= 1.1 and len(rows) > 1
    with Image.open("tuned/plot.png") as picture:
        assert picture.width > 400
    told = cli("compare", "a cat", *common, "--preset", "tuned/1.1x.json", "--no-peers")
    assert "tuned/1.1x.json" in told and "dpm++2m-karras" in told
    cli("generate", "a cat", *common, "--preset", "tuned/1.1x.json", "--out", "pictures")
    switch = parse_configuration("preset: tuned/1.1x.json").switches
    assert switch["preset"]["name"] == "tuned/1.1x.json"


@pytest.mark.parametrize("free", [False, True])
def test_steps_are_kept_unless_asked_otherwise(folder, tmp_path, monkeypatch, free):
    """And with how many to call is told."""
    monkeypatch.setenv("COLUMNS", "200")
    asked = {}

    def tuned(pipe, prompts, **options):
        asked.update(options)
        first, *others = tune(pipe, prompts, **options | {"steps": "kept"})
        return [first, *(replace(each, steps=4 if free else each.steps) for each in others)]

    monkeypatch.setattr("tomesd_plus.tuning.tune", tuned)
    common = ("tune", "a cat", "--model", folder, "--steps", 6, "--size", 32, "--speedup", 1.1, "--speedup", 1.3,
              "--generations", 6)  # fmt: skip
    arguments = [*common, "--out", tmp_path, *(["--free"] if free else [])]
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    assert asked["steps"] == ("free" if free else "kept")
    assert ("other numbers of steps: 1.3x.json with 4." in result.output) == free


def test_schedulers_by_name(pipe):
    for name, kind in SCHEDULERS.items():
        assert type(scheduler_by_name(name, pipe.scheduler.config)).__name__ == kind
    made = scheduler_by_name("EulerDiscreteScheduler-karras", pipe.scheduler.config)
    assert made.config.use_karras_sigmas and made.config.beta_schedule == pipe.scheduler.config.beta_schedule
    for name, words in (("best", "choose from ddim"), ("UNet2DModel", "unknown"), ("ddim-karras", "no Karras")):
        with pytest.raises(ModelError, match=words):
            scheduler_by_name(name, pipe.scheduler.config)
