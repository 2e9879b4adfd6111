"""The first pass: the same files however it is run, and nothing lost whatever happens.

One file, since most tests take copies of one experiment, which is made once.
"""

import errno
import os
import shutil
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from tomesd_plus.evaluation import experiment as experiments
from tomesd_plus.evaluation.configurations import complete, parse_configuration
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.experiment import Experiment
from tomesd_plus.evaluation.file_io import atomic_write
from tomesd_plus.evaluation.generation import Sampling, Share
from tomesd_plus.evaluation.generation.conditions import describe
from tomesd_plus.evaluation.generation.run import generate_images
from tomesd_plus.evaluation.items import make_items
from tomesd_plus.merging.config import ToMeConfig

SAMPLING = Sampling(steps=2, height=32, width=32)
ITEMS = tuple(make_items([(f"{index:06}", f"a cat {'abcdef'[index]}") for index in range(5)]))
CONFIGURATIONS = complete([parse_configuration("merge: 0.5")])


def opened(pipe, out, items=ITEMS, configurations=CONFIGURATIONS, sampling=SAMPLING):
    return Experiment(out, items, "a test").prepare(configurations, describe(pipe, "random weights", sampling))


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


def test_what_is_there_is_left_alone_and_what_is_missing_comes(pipe, tmp_path, monkeypatch):
    experiment = opened(pipe, tmp_path / "pairs")
    generate_images(pipe, experiment, CONFIGURATIONS, SAMPLING, batch_size=2)
    before = contents(experiment.out)
    experiment.folder("baseline").image(ITEMS[3]).unlink()
    calls = []
    forward = type(pipe).__call__
    monkeypatch.setattr(
        type(pipe), "__call__", lambda self, prompt, **kw: calls.append(prompt) or forward(self, prompt, **kw)
    )
    generate_images(pipe, opened(pipe, experiment.out), CONFIGURATIONS, SAMPLING, batch_size=2)
    assert calls == [[ITEMS[2].prompt, ITEMS[3].prompt]] and contents(experiment.out) == before


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
        ({"sampling": replace(SAMPLING, guidance_scale=5.0)}, "guidance_scale was 7.5, is now 5.0"),
        ({"items": make_items([("000000", "a dog")])}, "other prompts or seeds"),
        ({"items": tuple(replace(item, seed=1) for item in ITEMS)}, "other prompts or seeds"),
        (
            {"configurations": [parse_configuration("name: 'merge: 0.5', merge: 0.6")]},
            r"switches\.merge\.ratio\.noisy was 0\.7, is now 0\.75",
        ),
    ],
)
def test_a_folder_of_another_configuration_is_refused_untouched(pipe, generated, change, words):
    before = contents(generated.out)
    with pytest.raises(EvaluationError, match=words):
        opened(pipe, generated.out, **{"items": ITEMS, **change})
    assert contents(generated.out) == before


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_other_weights_are_refused(pipe, generated, name):
    with torch.no_grad():
        list(getattr(pipe, name).parameters())[-1].add_(1e-3)
    with pytest.raises(EvaluationError, match=f"fingerprint.{name} was"):
        opened(pipe, generated.out)


def test_other_schedulers_are_refused(pipe, generated):
    pipe = make_pipeline("sd")
    pipe.scheduler.register_to_config(steps_offset=0)
    with pytest.raises(EvaluationError, match=r"scheduler\.steps_offset was 1, is now 0"):
        opened(pipe, generated.out)


def test_a_scheduler_with_an_infinity_can_be_described(pipe, tmp_path):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    experiment = opened(pipe, tmp_path, ITEMS[:1], CONFIGURATIONS[:1])
    assert generate_images(pipe, experiment, CONFIGURATIONS[:1], SAMPLING) == 0
    assert experiment.folder("baseline").manifest["scheduler"]["lambda_min_clipped"] == "-inf"
    assert opened(pipe, tmp_path, ITEMS[:1], CONFIGURATIONS[:1]) == experiment


def test_a_method_is_what_it_resolves_to(pipe, generated, monkeypatch):
    merge = generated.folder("merge-0.5").manifest["configuration"]["switches"]["merge"]
    assert merge["plan_per"] == "stage" and merge["ratio"]["class"] == "CosineSchedule"
    monkeypatch.setattr(ToMeConfig.__init__, "__defaults__", tuple(
        3 if name == "plan_every" else default
        for name, default in zip(list(signature(ToMeConfig).parameters), ToMeConfig.__init__.__defaults__)
    ))  # fmt: skip
    with pytest.raises(EvaluationError, match=r"switches\.merge\.plan_every was 1, is now 3"):
        opened(pipe, generated.out)


def test_a_deleted_folder_comes_back_in_its_place_and_as_it_was(pipe, generated):
    shutil.rmtree(generated.out / "baseline")
    with pytest.raises(EvaluationError, match=r"merge-0.5 was made with another configuration: sampling.steps"):
        opened(pipe, generated.out, configurations=CONFIGURATIONS[:1], sampling=replace(SAMPLING, steps=3))
    again = opened(pipe, generated.out, configurations=CONFIGURATIONS[:1])
    assert again.configurations == generated.configurations == Experiment.load(again.out).configurations


def test_what_decides_by_batch_or_by_time_is_seen(pipe, tmp_path):
    by_batch = [parse_configuration("cache: {interval: 3, threshold: 0.1}")]
    batch = {"size": 2, "processes": 1}
    conditions = describe(pipe, "random weights", SAMPLING)
    Experiment(tmp_path, ITEMS, "a test").prepare([*CONFIGURATIONS, *by_batch], conditions, batch)
    again = Experiment(tmp_path, ITEMS, "a test").prepare(CONFIGURATIONS, conditions, {"size": 3, "processes": 1})
    assert "batch" not in again.folder("merge-0.5").manifest["configuration"]
    with pytest.raises(EvaluationError, match=r"batch\.size was 2, is now 3"):
        again.prepare(by_batch, conditions, {"size": 3, "processes": 1})
    with pytest.raises(EvaluationError, match="chosen by measured times"):
        opened(pipe, tmp_path, configurations=[parse_configuration("merge: {ratio: 0.5, gate: on}")])


def test_what_another_process_put_into_the_index_stays(pipe, tmp_path, monkeypatch):
    more, write = [parse_configuration("merge: 0.25")], experiments.write_json

    def interrupted(path, value):
        if path.name == "experiment.json":
            monkeypatch.setattr(experiments, "write_json", write)
            opened(pipe, tmp_path, configurations=more)
        write(path, value)

    monkeypatch.setattr(experiments, "write_json", interrupted)
    opened(pipe, tmp_path)
    opened(pipe, tmp_path, configurations=more)
    assert "merge-0.25" in Experiment.load(tmp_path).configurations


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


def test_only_ones_own_leftovers_are_removed(pipe, generated):
    folder = generated.folder("baseline")
    own, others = folder.image(ITEMS[0]), folder.image(ITEMS[1])
    halves = [path.with_name(f".{path.name}.host-12ab.tmp") for path in (own, others, folder.path / "manifest.json")]
    for half in halves:
        half.write_bytes(b"half")
    generate_images(pipe, generated, CONFIGURATIONS, SAMPLING, share=Share(0, 5))
    assert [half.exists() for half in halves] == [False, True, True]


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
