"""Speeds: measured once, kept as long as they hold; and the rows of equal time that follow from them."""

import json
from dataclasses import asdict, replace
from importlib import import_module

import pytest
import torch
from test_evaluation_generation import CONFIGURATIONS, ITEMS, SAMPLING, opened

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.experiment import Experiment
from tomesd_plus.evaluation.generation import Share, generate, generate_experiment, timing
from tomesd_plus.evaluation.generation.devices import device_name
from tomesd_plus.evaluation.generation.timing import measured_speeds
from tomesd_plus.evaluation.speed import Speed, load_speeds, manifest_digest

SPEED = Speed(1.0, 0.4, 1.0, 1.0, 3.0, runs=2, batch_size=1, memory_mib=1.0, device=device_name(torch.device("cpu")))
ROW = "baseline-1-step-equal-time"


def write_speeds(experiment, speedups, **changes):
    entries = {
        name: asdict(replace(SPEED, speedup=speedup, manifest=manifest_digest(experiment, name), **changes))
        for name, speedup in speedups.items()
    }
    (experiment.out / "speed.json").write_text(json.dumps(entries))


def run(pipe, out, items=ITEMS, **options):
    experiment = Experiment(out, items, "a test")
    return generate_experiment(pipe, "random weights", experiment, CONFIGURATIONS, SAMPLING, **options)[0]


def test_speeds_are_measured_once_and_give_rows_of_equal_time(pipe, tmp_path):
    write_speeds(opened(pipe, tmp_path, ITEMS[:1]), {"baseline": 1.0, "merge-0.5": 1.5})
    experiment = run(pipe, tmp_path, ITEMS[:1], timed_runs=2)
    measured = json.loads((tmp_path / "speed.json").read_text())
    assert measured["merge-0.5"]["speedup"] == 1.5  # what was there stays
    row = measured[ROW]
    assert row["runs"] == 2 and row["seconds"] > 0 and row["memory_mib"] > 50
    assert experiment.folder(ROW).manifest["sampling"]["steps"] == 1
    assert experiment.missing() == {}


def test_a_shard_of_its_own_measures_nothing(pipe, tmp_path):
    experiment = run(pipe, tmp_path, share=Share(1, 2))
    assert len(experiment.configurations) == 3 and not (tmp_path / "speed.json").exists()


def test_processes_launched_together_wait_for_the_first_ones_speeds(pipe, tmp_path, monkeypatch):
    waits, names = [], [configuration.folder for configuration in CONFIGURATIONS]

    def sleep(seconds):
        waits.append(seconds)
        assert not list(tmp_path.glob("*/*.png")), "no image before the speeds, which it would disturb"
        speedups = {**dict.fromkeys(names, 1.0), "merge-0.5": 1.5}
        if len(waits) in (2, 4):
            write_speeds(Experiment.load(tmp_path), speedups | ({ROW: 1.4} if len(waits) == 4 else {}))

    monkeypatch.setattr("tomesd_plus.evaluation.generation.run.time.sleep", sleep)
    experiment = run(pipe, tmp_path, share=Share(1, 2, 2), timed_runs=2)
    assert len(waits) == 4 and experiment.missing() == dict.fromkeys([*names, ROW], 3)


def test_speeds_that_hold_no_longer_are_ignored(pipe, tmp_path):
    experiment, both = opened(pipe, tmp_path), {"baseline": 1.0, "merge-0.5": 2.0}
    write_speeds(experiment, both)
    assert load_speeds(experiment).keys() == both.keys() == load_speeds(experiment, 2, 1).keys()
    assert not load_speeds(experiment, runs=3) and not load_speeds(experiment, batch_size=2)
    entries = json.loads((tmp_path / "speed.json").read_text())
    for change in ({"batch_size": 4}, {"device": "another"}, {"manifest": "of other steps"}):
        (tmp_path / "speed.json").write_text(json.dumps(entries | {"merge-0.5": entries["merge-0.5"] | change}))
        assert load_speeds(experiment).keys() == {"baseline"}
    (tmp_path / "speed.json").write_text(json.dumps({"baseline": {"unknown": 1}}))
    with pytest.raises(EvaluationError, match="not of this version: delete it"):
        load_speeds(experiment)


def test_another_batch_size_is_measured_anew(pipe, tmp_path):
    experiment = opened(pipe, tmp_path)
    write_speeds(experiment, dict.fromkeys(experiment.configurations, 1.0))
    measured = measured_speeds(pipe, experiment, CONFIGURATIONS, SAMPLING, 1, batch_size=2)
    assert {entry.batch_size for entry in measured.values()} == {2} and len(measured) == 3


def test_a_kill_loses_one_measurement_at_most(pipe, tmp_path, monkeypatch):
    experiment, measure, pairs = opened(pipe, tmp_path), timing.measure_speeds, []

    def once(pipe, pair, *options):
        pairs.append([configuration.folder for configuration in pair])
        if len(pairs) == 2:
            raise KeyboardInterrupt
        return measure(pipe, pair, *options)

    monkeypatch.setattr(timing, "measure_speeds", once)
    with pytest.raises(KeyboardInterrupt):
        measured_speeds(pipe, experiment, CONFIGURATIONS, SAMPLING, 1)
    assert load_speeds(experiment).keys() == {"baseline", "merge-0.5"}
    measured_speeds(pipe, experiment, CONFIGURATIONS, SAMPLING, 1)
    assert pairs == [["baseline", "merge-0.5"], *[["baseline", "another-seed-noise-floor"]] * 2]


def test_a_step_takes_what_steps_take_on_the_mean(pipe, monkeypatch):
    """The median would miss a cache's full steps."""
    ticks = iter([0, 9, 9, 10, 10, 20, 20, 21, 21, 22])  # the call's start, each step's end twice, the call's end
    module = import_module("tomesd_plus.evaluation.generation.sampling")
    monkeypatch.setattr(module, "now", lambda device: next(ticks))
    made = generate(pipe, "a cat", 0, replace(SAMPLING, steps=4))
    assert made.step_seconds == pytest.approx((1 + 10 + 1) / 3) and made.seconds == 22
