"""The second pass: figures, tables and pictures, from whatever lies in the folders.

One file, since all tests take copies of one evaluation, which is made once.
"""

import csv
import os
import platform
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from PIL import Image
from typer.testing import CliRunner

from tomesd_plus.cli import app
from tomesd_plus.evaluation.configurations import complete, parse_configuration
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.experiment import Experiment
from tomesd_plus.evaluation.generation import Sampling, generate_experiment
from tomesd_plus.evaluation.items import make_items
from tomesd_plus.evaluation.reporting import joined, write_report
from tomesd_plus.evaluation.scoring import Scoring, load_extractor, load_results, score
from tomesd_plus.metrics import Statistics
from tomesd_plus.metrics.intervals import resampling_weights

SAMPLING = Sampling(steps=3, height=32, width=32)
ITEMS = tuple(make_items([(f"{index:06}", f"a cat {'abcdef'[index]}") for index in range(4)]))
TINY = ("Fréchet distance (tiny CLIP)", "kernel distance (tiny CLIP)", "CMMD (tiny CLIP)", "CLIP score (tiny CLIP)")


@pytest.fixture(scope="module")
def scoring():
    return Scoring([load_extractor("tiny")], "embedded", resamples=20)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scoring):
    """An evaluation, generated and scored."""
    out = tmp_path_factory.mktemp("evaluation")
    configurations = complete([parse_configuration("merge: 0.25"), parse_configuration("merge: 0.75")])
    experiment = Experiment(out, ITEMS, "a test", skipped_prompts=2)
    generate_experiment(make_pipeline("sd"), "random weights", experiment, configurations, SAMPLING, timed_runs=1,
                        equal_time=False)  # fmt: skip
    write_report(score(out, scoring), out)
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "evaluation")


def rows(folder):
    return {row.name: row for row in load_results(folder)}


def test_every_row_has_every_figure_with_its_interval(finished):
    table = rows(finished)
    assert list(table) == ["baseline", "merge: 0.25", "merge: 0.75", "another seed (noise floor)"]
    for name, row in table.items():
        fidelity_metrics = () if name == "baseline" else ("PSNR dB", "SSIM")
        assert set(row.metrics) == {*TINY, *fidelity_metrics}
        for estimate in row.metrics.values():
            assert estimate.low < estimate.value < estimate.high and estimate.count == 4
        assert (row.images, row.failed, row.unreadable) == (4, 0, 0)
        assert row.speed.seconds > 0 and row.speed.memory_mib > 50
    values = {name: row.metrics["PSNR dB"].value for name, row in table.items() if name != "baseline"}
    assert values["merge: 0.25"] > values["merge: 0.75"] > values["another seed (noise floor)"]
    assert table["merge: 0.75"].speed.removed[0]["removed"]["1"] > 0.5


def test_figures_are_those_of_the_images(finished, scoring):
    folder = Experiment.load(finished).folder("merge-0.75")
    images = [torch.from_numpy(np.array(Image.open(folder.image(item)))).permute(2, 0, 1) for item in ITEMS]
    clip = scoring.extractors[0]
    features = clip.of_images(torch.stack(images))
    texts = clip.of_texts([item.prompt for item in ITEMS])
    row = rows(finished)["merge: 0.75"]
    assert row.metrics[TINY[3]].value == pytest.approx(
        100 * (features * texts).sum(1).clamp(min=0).mean().item(), rel=1e-4
    )
    each = 100 * (features * texts).sum(1).clamp(min=0).double()
    spread = (resampling_weights(4, 20).double() @ each / 4).std().item()
    estimate = row.metrics[TINY[3]]
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * spread, rel=1e-3)
    base = Experiment.load(finished).folder("baseline")
    originals = [np.array(Image.open(base.image(item)), dtype=float) for item in ITEMS]
    errors = [((image.permute(1, 2, 0).numpy() - original) ** 2).mean() for image, original in zip(images, originals)]
    assert row.metrics["PSNR dB"].value == pytest.approx(
        np.mean([10 * np.log10(255**2 / e) for e in errors]), rel=1e-4
    )


def test_every_row_says_how_it_was_made(finished):
    with (finished / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["configuration"] for line in lines][:2] == ["baseline", "merge: 0.25"]
    for line in lines:
        for key in ("images", "steps", "scheduler", "guidance_scale", "dtype", "device", "torch", "diffusers", "seeds",
                    "model", "prompts", "references", "seconds", "speedup", "memory_mib", *TINY[:1]):  # fmt: skip
            assert line[key], key
    markdown = (finished / "results.md").read_text()
    assert "random weights, 32 × 32, DDIMScheduler, guidance 7.5, float32, CPU" in markdown
    assert "| another seed (noise floor) | 4 | 1000003 | 3 |" in markdown
    assert "2 empty prompts were left out." in markdown
    assert "4 generated images for the 64 dimensions of tiny CLIP" in markdown
    assert "FID" not in markdown


def test_pictures_are_drawn(finished):
    for name in ("pareto", "grid", "ratios"):
        with Image.open(finished / f"{name}.png") as picture:
            assert picture.width > 500 and len(np.unique(np.asarray(picture))) > 50


def test_a_report_can_be_made_again_and_joined(finished, out, tmp_path):
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for name in ("results.csv", "results.md", "pareto.png", "grid.png"):
        (out / name).unlink()
    result = CliRunner().invoke(app, ["report", str(out)])
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    result = CliRunner().invoke(app, ["report", str(finished), str(out), "--out", str(tmp_path / "both")])
    assert result.exit_code == 0, result.output
    both = load_results(tmp_path / "both")
    assert len(both) == 8 and both[4].name == "evaluation: baseline" and both[4].images_at.samefile(out / "baseline")
    assert (tmp_path / "both" / "grid.png").exists()
    assert [row.metrics for row in joined([out])] == [row.metrics for row in joined([finished])]


def test_evaluations_of_one_name_are_told_apart(finished, tmp_path):
    for above in ("one", "two"):
        (tmp_path / above / "evaluation").mkdir(parents=True)
        shutil.copy(finished / "results.json", tmp_path / above / "evaluation")
    names = [row.name for row in joined([tmp_path / above / "evaluation" for above in ("one", "two")])]
    assert (names[0], names[4]) == ("one/evaluation: baseline", "two/evaluation: baseline")


def test_scoring_again_gives_the_same_even_after_a_kill(out, scoring):
    before = (out / "results.json").read_bytes()
    killed, running = (out / f".features-{platform.node()}-{process}-x" for process in (2**22 + 1, os.getpid()))
    for folder in (killed, running):
        folder.mkdir()
        (folder / "images.npy").write_bytes(b"half")
    score(out, scoring)
    assert (out / "results.json").read_bytes() == before and list(out.glob(".features-*")) == [running]


class Colours:
    """An extractor that is no network; it may fail."""

    name, dimensions, batch_size = "mean colour", 3, 4

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = 0, fails_at

    def of_images(self, images):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return images.float().mean(dim=(2, 3))


def test_what_is_scored_stays_scored(out, finished, scoring):
    before = rows(out)
    colours = replace(scoring, extractors=[Colours(fails_at=4)], reference=str(finished / "merge-0.75"))
    with pytest.raises(KeyboardInterrupt):
        score(out, colours)
    assert list(rows(out)) == list(before) and "CLIP score (tiny CLIP)" in rows(out)["merge: 0.75"].metrics
    again = Colours()
    score(out, replace(colours, extractors=[again]))
    assert again.calls == 3  # the reference and two of the four rows
    for name, row in rows(out).items():
        assert row.metrics.items() > before[name].metrics.items()
        assert "Fréchet distance (mean colour)" in row.metrics and set(row.references) == {"tiny CLIP", "mean colour"}
    Image.new("RGB", (32, 32)).save(Experiment.load(out).folder("merge-0.25").image(ITEMS[0]))
    score(out, replace(colours, extractors=[again]))
    assert again.calls == 5 and TINY[0] not in rows(out)["merge: 0.25"].metrics  # of other images


def test_lost_images_are_counted_and_said(out, scoring):
    experiment = Experiment.load(out)
    folder = experiment.folder("merge-0.25")
    folder.image(ITEMS[0]).write_bytes(folder.image(ITEMS[0]).read_bytes()[:100])
    folder.image(ITEMS[1]).unlink()
    folder.save(ITEMS[1], torch.full((3, 32, 32), float("nan")))
    score(out, scoring)
    row = rows(out)["merge: 0.25"]
    assert (row.images, row.failed, row.unreadable) == (2, 1, 1)
    assert {estimate.count for estimate in row.metrics.values()} == {2}
    assert any("1 items have no image: not a number" in note for note in row.notes)
    assert any("over fewer images" in note for note in row.notes)
    reason = row.unreadable_files[f"{ITEMS[0].name}.png"]
    assert any(f"1 images cannot be read: {ITEMS[0].name}.png ({reason})" in note for note in row.notes)
    assert "| 2 (2 lost) |" in (out / "results.md").read_text()
    assert rows(out)["merge: 0.75"].images == 4


def test_losses_of_the_baseline_are_said_in_the_rows_that_are_compared_with_it(out, scoring):
    folder = Experiment.load(out).folder("baseline")
    folder.image(ITEMS[0]).write_bytes(b"broken")
    folder.image(ITEMS[1]).unlink()
    folder.save(ITEMS[1], torch.full((3, 32, 32), float("nan")))
    score(out, scoring)
    row = rows(out)["merge: 0.25"]
    assert row.images == 4 and row.metrics["PSNR dB"].count == 2 and row.metrics[TINY[0]].count == 4
    assert any(note.startswith("merge: 0.25: 1 images have no baseline image") for note in row.notes)
    assert "merge: 0.25: 1 images of the baseline cannot be read." in row.notes
    with (out / "results.csv").open() as file:
        line = list(csv.DictReader(file))[1]
    assert (line["PSNR dB images"], line[f"{TINY[0]} images"]) == ("2", "4")


def test_pairs_of_different_size_are_left_out_and_said(out, scoring):
    path = Experiment.load(out).folder("merge-0.25").image(ITEMS[0])
    Image.new("RGB", (16, 16)).save(path)
    score(out, scoring)
    row = rows(out)["merge: 0.25"]
    assert row.metrics["PSNR dB"].count == 3 and row.metrics[TINY[0]].count == 4
    assert "merge: 0.25: 1 pairs of images differ in size and were left out." in row.notes


def test_missing_images_are_said(out, scoring):
    Experiment.load(out).folder("merge-0.25").image(ITEMS[0]).unlink()
    with pytest.raises(EvaluationError, match=r"1 of 'merge-0\.25'"):
        score(out, scoring)
    shutil.rmtree(out / "merge-0.25")
    score(out, scoring)
    assert "merge: 0.25" not in rows(out)
    shutil.rmtree(out / "baseline")
    with pytest.raises(EvaluationError, match="no images of the baseline"):
        score(out, scoring)
    for folder in out.glob("*/"):
        shutil.rmtree(folder)
    result = CliRunner().invoke(app, ["evaluate", "score", "--out", str(out)])
    assert result.exit_code == 2 and "no images of the baseline" in result.stderr


def test_references_may_be_folders_or_other_tools_statistics(out, scoring, tmp_path):
    clip = scoring.extractors[0]
    own = Experiment.load(out).folder("baseline")
    score(out, replace(scoring, reference=str(own.path)))
    row = rows(out)["baseline"]
    assert row.metrics[TINY[0]].value < 1e-6 and row.references == {"tiny CLIP": str(own.path)}
    assert any("4 reference images for the 64 dimensions" in note for note in row.notes)
    statistics = Statistics.of(clip.of_images(torch.randint(0, 256, (90, 3, 32, 32), dtype=torch.uint8)))
    np.savez(tmp_path / "theirs.npz", mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy())
    score(out, replace(scoring, reference=str(tmp_path / "theirs.npz")))
    row = rows(out)["baseline"]
    assert TINY[0] in row.metrics and TINY[2] not in row.metrics
    assert any("CMMD (tiny CLIP) is left out" in note for note in row.notes)
    score(out, replace(scoring, reference=None))
    assert set(rows(out)["baseline"].metrics) == {TINY[3]}


def test_a_reference_can_be_saved_and_taken_again(out, scoring, tmp_path):
    own = Experiment.load(out).folder("baseline")
    score(out, replace(scoring, reference=str(own.path)))
    from_images = rows(out)["baseline"].metrics
    arguments = ["statistics", str(own.path), "--features", "tiny", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "reference.npz")])
    assert result.exit_code == 0 and "4 pictures by tiny CLIP" in result.output
    score(out, replace(scoring, reference=str(tmp_path / "reference.npz")))
    assert rows(out)["baseline"].metrics == from_images
    with np.load(tmp_path / "reference.npz") as file:
        others = {**file, "extractor": np.array("another CLIP")}
    np.savez(tmp_path / "others.npz", **others)
    with pytest.raises(EvaluationError, match="by another CLIP, but the images' are by tiny CLIP"):
        score(out, replace(scoring, reference=str(tmp_path / "others.npz")))
    assert CliRunner().invoke(app, [*arguments, "--out", "reference.csv"]).exit_code == 2


def test_what_is_left_out_of_a_reference_is_counted_with_reasons(out, scoring, tmp_path):
    folder = tmp_path / os.fsdecode(b"odd \xff\n[b]name[/b]")
    shutil.copytree(Experiment.load(out).folder("baseline").path, folder, ignore=shutil.ignore_patterns("*.json"))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / ".hidden.png").touch()
    (folder / "notes.txt").touch()
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(folder / "float.tif")
    counts = {
        "no picture in a format that is read": 2, "hidden": 1, "no picture by its suffix": 1,
        "floats of no declared range": 1,
    }  # fmt: skip
    note = "1 × floats of no declared range, 1 × hidden, 1 × no picture by its suffix."
    score(out, replace(scoring, reference=str(folder)))
    for row in load_results(out):
        assert row.reference_skipped == {"tiny CLIP": counts}
        (said,) = [line for line in row.notes if line.startswith("left out of ")]
        assert said.isprintable() and said.endswith(f"2 × no picture in a format that is read, {note}")
    assert "left out of " in (out / "results.md").read_text(encoding="utf-8")
    result = CliRunner().invoke(app, ["report", str(out)])
    assert result.exit_code == 0 and "[b]name[/b]: 2 × no picture" in result.output.replace("\n", " ")
    saved = str(tmp_path / "r.npz")
    result = CliRunner().invoke(
        app, ["statistics", str(folder), "--features", "tiny", "--device", "cpu", "--out", saved]
    )
    assert result.exit_code == 0 and "left out: 2 × no picture" in result.output.replace("\n", " ")
    score(out, replace(scoring, reference=saved))
    assert rows(out)["baseline"].reference_skipped == {"tiny CLIP": counts}


def test_references_that_cannot_be_used_are_said(out, scoring, tmp_path, monkeypatch):
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (tmp_path / "broken.npz").write_bytes(b"PK broken")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "one.png")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name, words in {
        "other.npz": "made with another network",
        "broken.npz": "cannot read statistics",
        "none.npz": "No such file",
        "empty": "a distance needs at least 2",
        "no-such": "pip install datasets",
    }.items():
        with pytest.raises(EvaluationError, match=words):
            score(out, replace(scoring, reference=str(tmp_path / name)))


def test_progress_ends_where_it_said(out, scoring):
    done, totals = {}, {}

    def on_progress(name, count, total):
        done[name] = done.get(name, 0) + count
        totals[name] = total

    for file in out.glob("*/score-*.json"):
        file.unlink()
    score(out, scoring, on_progress)
    images = {"baseline": 4, "merge: 0.25": 8, "merge: 0.75": 8, "another seed (noise floor)": 8}
    assert done == totals and done == {
        **{f"score: {name}": count for name, count in images.items()},
        **{f"score: {name}, intervals": 20 for name in images},
    }
