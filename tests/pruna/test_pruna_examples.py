"""The examples run, and write what they say."""

import csv
import os
import runpy
from pathlib import Path

import pruna_tools  # noqa: F401
import pytest

ROOT = Path(__file__).parents[2]


def run(name, tmp_path, monkeypatch, *arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return sorted(os.listdir(tmp_path))


def test_smash(tmp_path, monkeypatch):
    assert run("pruna_smash.py", tmp_path, monkeypatch) == ["smashed", "smashed.png", "untouched.png"]
    assert len((ROOT / "examples" / "pruna_smash.py").read_text().splitlines()) < 40


def test_speed(tmp_path, monkeypatch):
    assert run("pruna_speed.py", tmp_path, monkeypatch, "1", "1", "9") == ["pruna.csv"]
    with (tmp_path / "pruna.csv").open() as file:
        made = list(csv.DictReader(file))
    with (ROOT / "results" / "pruna.csv").open() as file:
        published = list(csv.DictReader(file))
    assert [row["setting"] for row in made] == [row["setting"] for row in published]
    assert all(float(row["PSNR dB"]) > 10 for row in made[1:]) and made[0]["PSNR dB"] == ""
    assert made[0].keys() == published[0].keys()


@pytest.mark.parametrize("name", ["tome_sd", "tome_cache", "tome_vision"])
def test_the_page_tells_every_hyperparameter(name):
    from pruna import AlgorithmRegistry

    page = (ROOT / "docs" / "pruna.md").read_text()
    section = page[page.index(f"### `{name}`") :].split("\n### ")[0].split("\n## ")[0]
    for each in AlgorithmRegistry[name].hyperparameters:
        assert f"| `{each.name.removeprefix(f'{name}_')}` |" in section
