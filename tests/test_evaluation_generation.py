"""The first pass: the same files however it is run, and nothing lost whatever happens."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from PIL import Image
from typer.testing import CliRunner

from tomesd_plus.cli import app
from tomesd_plus.evaluation import (
    EvaluationError,
    Experiment,
    Sampling,
    Share,
    complete,
    describe,
    generate_experiment,
    generate_images,
    make_items,
    parse_configuration,
)
from tomesd_plus.evaluation.files import atomic_write

SAMPLING = Sampling(steps=2, height=32, width=32)
ITEMS = tuple(make_items([(f"{index:06}", f"a cat {'abcdef'[index]}") for index in range(5)]))
CONFIGURATIONS = complete([parse_configuration("merge: 0.5")])


def opened(pipe, out, items=ITEMS, configurations=CONFIGURATIONS, sampling=SAMPLING):
    return Experiment(out, items, "a test").opened(configurations, describe(pipe, "random weights", sampling))


def contents(folder):
    """Every file below a folder: {path: bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    pipe = make_pipeline("sd")
    experiment = opened(pipe, tmp_path_factory.mktemp("whole"))
    assert generate_images(pipe, experiment, CONFIGURATIONS, SAMPLING) == 0
    return experiment


@pytest.fixture
def generated(whole, tmp_path):
    """A finished experiment, a copy for each test."""
    return replace(whole, out=Path(shutil.copytree(whole.out, tmp_path / "whole")))


def test_each_item_has_an_image_in_each_configuration(generated):
    assert generated.missing() == {}
    pixels = {}
    for configuration in CONFIGURATIONS:
        folder = generated.folder(configuration)
        images = [np.asarray(Image.open(folder.image(item))) for item in ITEMS]
        assert all(image.shape == (32, 32, 3) for image in images)
        assert len({image.tobytes() for image in images}) == len(ITEMS)
        pixels[configuration.name] = images
    assert not any(np.array_equal(*pair) for pair in zip(pixels["baseline"], pixels["another seed (noise floor)"]))
    assert not all(np.array_equal(*pair) for pair in zip(pixels["baseline"], pixels["merge: 0.5"]))


def test_shares_in_any_order_give_the_same_files(pipe, generated, tmp_path):
    experiment = opened(pipe, tmp_path / "shares")
    for index in (2, 0, 1):
        generate_images(pipe, experiment, CONFIGURATIONS[::-1], SAMPLING, share=Share(index, 3))
    assert contents(experiment.out) == contents(generated.out)


def test_the_batch_size_does_not_matter(pipe, generated, tmp_path):
    experiment = opened(pipe, tmp_path / "batches")
    generate_images(pipe, experiment, CONFIGURATIONS, SAMPLING, batch_size=3)
    for configuration in CONFIGURATIONS:
        for item in ITEMS:
            ours, theirs = (
                np.asarray(Image.open(other.folder(configuration).image(item)), dtype=int)
                for other in (experiment, generated)
            )
            assert abs(ours - theirs).max() <= 1  # a larger batch may add in another order


def test_tomesd_gives_the_same_files_again(pipe, tmp_path):
    """Although it draws from the global generator, each time on."""
    configurations = [parse_configuration("tomesd: 0.5")]
    for name in ("one", "two"):
        experiment = opened(pipe, tmp_path / name, ITEMS[:2], configurations)
        for index in (0, 1) if name == "one" else (1, 0):
            generate_images(pipe, experiment, configurations, SAMPLING, share=Share(index, 2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_is_there_is_left_alone_and_what_is_missing_comes(pipe, generated, monkeypatch):
    before = contents(generated.out)
    generated.folder("baseline").image(ITEMS[3]).unlink()
    calls = []
    forward = type(pipe).__call__
    monkeypatch.setattr(
        type(pipe), "__call__", lambda self, prompt, **kw: calls.append(prompt) or forward(self, prompt, **kw)
    )
    generate_images(pipe, opened(pipe, generated.out), CONFIGURATIONS, SAMPLING, batch_size=2)
    assert calls == [[ITEMS[3].prompt]] and contents(generated.out) == before


def test_an_experiment_may_grow(pipe, generated, tmp_path):
    fewer, more = opened(pipe, tmp_path / "grown", ITEMS[:2]), complete([parse_configuration("merge: 0.25")])
    generate_images(pipe, fewer, CONFIGURATIONS, SAMPLING)
    assert opened(pipe, tmp_path / "grown", configurations=more).items == ITEMS
    grown = opened(pipe, tmp_path / "grown", ITEMS[:3])
    assert grown.items == ITEMS
    assert grown.configurations == ("baseline", "merge-0.5", "another-seed-noise-floor", "merge-0.25")
    assert grown.missing() == {"baseline": 3, "merge-0.5": 3, "another-seed-noise-floor": 3, "merge-0.25": 5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampling": replace(SAMPLING, steps=3)}, "sampling.steps was 2, is now 3"),
        ({"sampling": replace(SAMPLING, guidance_scale=7.5)}, "guidance_scale was 5.0, is now 7.5"),
        ({"items": make_items([("000000", "a dog")])}, "other prompts or seeds"),
        ({"items": tuple(replace(item, seed=1) for item in ITEMS)}, "other prompts or seeds"),
        ({"configurations": [parse_configuration("name: 'merge: 0.5', merge: 0.6")]}, "ratio was 0.5, is now 0.6"),
    ],
)
def test_a_folder_of_another_configuration_is_refused_untouched(pipe, generated, change, words):
    before = contents(generated.out)
    with pytest.raises(EvaluationError, match=words):
        opened(pipe, generated.out, **{"items": ITEMS, **change})
    assert contents(generated.out) == before


def test_other_weights_and_schedulers_are_refused(pipe, generated):
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(2)
    with pytest.raises(EvaluationError, match="fingerprint"):
        opened(pipe, generated.out)
    pipe = make_pipeline("sd")
    pipe.scheduler.register_to_config(steps_offset=0)
    with pytest.raises(EvaluationError, match=r"scheduler\.steps_offset was 1, is now 0"):
        opened(pipe, generated.out)


def test_a_broken_index_or_manifest_is_said(pipe, generated):
    (generated.out / "baseline" / "manifest.json").write_text("{")
    with pytest.raises(EvaluationError, match="cannot read"):
        opened(pipe, generated.out)
    (generated.out / "experiment.json").write_text("[]")
    with pytest.raises(EvaluationError, match=r"experiment\.json"):
        Experiment.load(generated.out)


def test_images_that_are_no_numbers_are_counted_and_not_made_again(pipe, tmp_path, monkeypatch):
    decode = pipe.vae.decode
    made = []

    def broken(latents, *args, **kwargs):
        made.append(1)
        image = decode(latents, *args, **kwargs)[0]
        return (image * float("nan") if len(made) == 2 else image,)

    monkeypatch.setattr(pipe.vae, "decode", broken)
    experiment = opened(pipe, tmp_path, configurations=CONFIGURATIONS[:1])
    assert generate_images(pipe, experiment, CONFIGURATIONS[:1], SAMPLING) == 1
    assert experiment.missing() == {}
    assert "not a number" in experiment.folder("baseline").failure(ITEMS[1]).read_text()
    assert not experiment.folder("baseline").image(ITEMS[1]).exists()
    assert generate_images(pipe, experiment, CONFIGURATIONS[:1], SAMPLING) == 1 and len(made) == len(ITEMS)


def test_a_full_disk_leaves_whole_files_and_what_comes_next(pipe, generated, tmp_path, monkeypatch):
    experiment = opened(pipe, tmp_path / "full")
    write, written = Path.write_bytes, []

    def full(self, data):
        written.append(self)
        if len(written) == 3:
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        generate_images(pipe, experiment, CONFIGURATIONS, SAMPLING)
    assert sum(experiment.missing().values()) == 3 * len(ITEMS) - 2
    assert not list(experiment.out.rglob("*.tmp"))
    generate_images(pipe, experiment, CONFIGURATIONS, SAMPLING)
    assert contents(experiment.out) == contents(generated.out)


def test_half_a_file_never_replaces_a_whole_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "whole")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, "another")
    assert contents(tmp_path) == {"file": b"whole"}


def test_a_share_is_what_launcher_and_user_say():
    launched = {"RANK": "1", "WORLD_SIZE": "2"}
    assert Share.here(None, {}) == Share(0, 1, 1)
    assert Share.here("2/3", {}) == Share(2, 3, 1)
    assert Share.here("2/3", launched) == Share(5, 6, 2)
    shares = [Share(index, 3).of(ITEMS) for index in range(3)]
    assert sorted((item for share in shares for item in share), key=ITEMS.index) == list(ITEMS)
    for wrong in ("3/3", "1", "a/b", "-1/2", "0/0"):
        with pytest.raises(EvaluationError, match="a shard is i/n"):
            Share.here(wrong, {})


def test_speeds_are_measured_once_and_give_rows_of_equal_time(pipe, tmp_path):
    experiment = Experiment(tmp_path, ITEMS[:1], "a test")
    known = {"seconds": 1.0, "step_seconds": 0.1, "speedup_low": 1.0, "speedup_high": 3.0, "runs": 1, "batch_size": 1,
             "memory_mib": 1.0}  # fmt: skip
    speeds = {"baseline": {**known, "speedup": 1.0}, "merge-0.5": {**known, "speedup": 2.0}}
    (tmp_path / "speed.json").write_text(json.dumps(speeds))
    experiment, _ = generate_experiment(pipe, "random weights", experiment, CONFIGURATIONS, SAMPLING, timed_runs=2)
    measured = json.loads((tmp_path / "speed.json").read_text())
    assert measured["merge-0.5"]["speedup"] == 2.0  # what was there stays
    row = measured["baseline-1-step-equal-time"]
    assert row["runs"] == 2 and row["seconds"] > 0 and row["memory_mib"] > 50
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert experiment.folder("baseline-1-step-equal-time").manifest["sampling"]["steps"] == 1
    assert experiment.missing() == {}
    shard = Experiment(tmp_path / "shard", ITEMS, "a test")
    shard, _ = generate_experiment(pipe, "random weights", shard, CONFIGURATIONS, SAMPLING, share=Share(1, 2))
    assert len(shard.configurations) == 3 and not (tmp_path / "shard" / "speed.json").exists()


def test_processes_launched_together_wait_for_the_first_ones_speeds(pipe, tmp_path, monkeypatch):
    speed = {"seconds": 1.0, "step_seconds": 0.1, "speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0, "runs": 1,
             "batch_size": 1, "memory_mib": 1.0}  # fmt: skip
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        assert not list(tmp_path.glob("*/*.png")), "no image before the speeds, which it would disturb"
        if len(waits) == 2:
            names = [configuration.folder for configuration in CONFIGURATIONS]
            (tmp_path / "speed.json").write_text(json.dumps(dict.fromkeys(names, speed)))

    monkeypatch.setattr("tomesd_plus.evaluation.generation.time.sleep", sleep)
    experiment = Experiment(tmp_path, ITEMS, "a test")
    experiment, _ = generate_experiment(
        pipe, "random weights", experiment, CONFIGURATIONS, SAMPLING, share=Share(1, 2, 2)
    )
    assert len(waits) == 2 and experiment.missing() == dict.fromkeys(experiment.configurations, 3)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A model in a folder, what to evaluate it with, and the finished evaluation of one process."""
    base = tmp_path_factory.mktemp("runs")
    make_pipeline("sd").save_pretrained(base / "model")
    (base / "prompts.txt").write_text("\n".join(f"a cat {letter}" for letter in "abcdefgh"))
    arguments = ["evaluate", "-c", "merge: 0.5", "--model", base / "model", "--prompts", base / "prompts.txt",
                 "--size", 32, "--steps", 2, "--features", "tiny", "--reference", "embedded", "--resamples", 5,
                 "--timed-runs", 1, "--device", "cpu"]  # fmt: skip
    arguments = [str(argument) for argument in arguments]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes, or sums differ in their last bits
    result = CliRunner().invoke(app, [*arguments, "--out", str(base / "one")])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return base, arguments


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def started(base, name):
    """A folder with the times of the first run: they decide which rows of equal time there are."""
    (base / name).mkdir()
    shutil.copy(base / "one" / "speed.json", base / name)
    return base / name


@pytest.mark.slow
def test_two_processes_give_the_same_files_and_figures(command):
    base, arguments = command
    out = started(base, "two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tomesd_plus"]
    subprocess.run([*launch, *arguments, "--out", out], check=True, env=environment(), timeout=280)
    assert contents(out) == contents(base / "one")


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_gives_the_same(command):
    base, arguments = command
    out = started(base, "killed")
    call = [sys.executable, "-m", "tomesd_plus", *arguments, "--out", out]
    process = subprocess.Popen(call, env=environment(), stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("*/*.png"))) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= len(list(out.glob("*/*.png"))) < 24, "it was to be killed in the middle"
    result = subprocess.run(call, env=environment(), timeout=280, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert contents(out) == contents(base / "one")
