"""The command line: what it writes and prints, and how it fails."""

import re

import numpy as np
import pytest
from conftest import make_pipeline
from PIL import Image
from typer.testing import CliRunner

from tomesd_plus.cli import app


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_pipeline("sd").save_pretrained(path)
    return path


def rows(output):
    """The printed table: {setting: cells}."""
    lines = [re.split(r"\s*│\s*", line.strip("│ ")) for line in output.splitlines() if "│" in line]
    return {cells[0]: cells[1:] for cells in lines}


def test_compare_prints_a_table_and_writes_a_picture(cli):
    result = cli(
        "compare",
        "--steps",
        6,
        "--schedule",
        "constant",
        "--ratio",
        0.25,
        "--ratio",
        0.5,
        "a large dog on a blue background",
    )
    assert result.exit_code == 0, result.output
    table = rows(result.output)
    assert {"untouched", "ratio 0.25", "ratio 0.5", "another seed"} <= set(table)
    assert any(name.startswith("tomesd's way") for name in table)
    assert table["ratio 0.5"][-1] == "level 1: 50%" and table["ratio 0.25"][-1] == "level 1: 25%"
    psnr = {name: float(cells[3]) for name, cells in table.items() if name != "untouched"}
    assert psnr["ratio 0.25"] > psnr["ratio 0.5"] > psnr["another seed"]
    assert table["untouched"][2] == "1.00×"
    with Image.open("compare.png") as picture:
        assert picture.width > 900 and len(np.unique(np.asarray(picture))) > 100


def test_a_folder_and_several_prompts_without_peers(cli, folder):
    result = cli("compare", "--model", folder, "--size", "32x48", "--steps", 3, "--no-peers", "--schedule", "steps",
                 "--more-at", "clean", "--out", "sub/one.png", "a cat", "a dog")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert set(rows(result.output)) == {"untouched", "ratio 0.5"}
    assert Image.open("sub/one.png").height > 400


def test_presets_and_caches_are_compared(cli, folder):
    common = ["--model", folder, "--size", 32, "--steps", 4, "a cat"]
    result = cli("compare", "--preset", "fast", "--preset", "quality", "--no-peers", *common)
    assert result.exit_code == 0, result.output
    assert set(rows(result.output)) == {"untouched", "preset fast", "preset quality"}
    pytest.importorskip("DeepCache")
    result = cli("compare", "--cache-interval", 2, "--ratio", 0.25, *common)
    assert result.exit_code == 0, result.output
    table = rows(result.output)
    assert {"cache 2", "ratio 0.25, cache 2", "DeepCache 2", "tomesd's way, 0.25"} <= set(table)
    assert table["cache 2"][3] == table["DeepCache 2"][3] != table["ratio 0.25, cache 2"][3]  # PSNR


def test_generate_takes_presets_and_caches(cli, folder, tmp_path):
    for out, options in {"quality": ["--preset", "quality"], "cache": ["--cache-interval", 2]}.items():
        result = cli("generate", "--model", folder, "--size", 32, "--steps", 9, *options, "--out", out, "a cat")
        assert result.exit_code == 0, result.output
    pictures = [np.asarray(Image.open(next((tmp_path / out).iterdir()))) for out in ("quality", "cache")]
    assert not np.array_equal(*pictures)
    result = cli("generate", "--model", folder, "--size", 32, "--steps", 8, "--preset", "fast", "a cat")
    assert result.exit_code == 2 and "is for 9 steps and more: with 8" in result.stderr
    result = cli("generate", "--preset", "fast", "--cache-interval", 2, "a cat")
    assert result.exit_code == 2 and "leave out --preset or" in result.stderr
    result = cli("generate", "--preset", "fastest", "a cat")
    assert result.exit_code == 2 and "quality, balanced, fast" in result.stderr


def test_generate_writes_a_picture_a_prompt_and_the_same_ones_again(cli, folder, tmp_path):
    for out in ("one", "two", "plain"):
        ratio = 0 if out == "plain" else 0.5
        result = cli("generate", "--model", folder, "--size", 32, "--steps", 2, "--seed", 5, "--ratio", ratio,
                     "--out", out, "a cat", "a dog / another")  # fmt: skip
        assert result.exit_code == 0, result.output
    names = ["000-5-a-cat.png", "001-6-a-dog-another.png"]
    assert all(sorted(p.name for p in (tmp_path / out).iterdir()) == names for out in ("one", "two", "plain"))
    pictures = [np.asarray(Image.open(tmp_path / out / names[0])) for out in ("one", "two", "plain")]
    assert pictures[0].shape == (32, 32, 3)
    assert (pictures[0] == pictures[1]).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ratio", "1"], "must be a number in [0, 1)"),
        (["--ratio", "-0.5"], "must be a number in [0, 1)"),
        (["--ratio", "0.9"], "0.9"),
        (["--schedule", "sine"], "unknown schedule 'sine'"),
        (["--model", "no/such-model"], "cannot load model 'no/such-model'"),
        (["--model", "missing.safetensors"], "no such file"),
        (["--model", "broken.safetensors"], "cannot load model 'broken.safetensors'"),
        (["--model", "empty"], "cannot load model 'empty'"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--size", "big"], "size must be"),
        (["--size", "0"], "size must be"),
        (["--size", "33"], "divisible by 8"),
        (["--ratio", "0.8"], "2 × 2"),
        (["--max-downsample", "3"], "max_downsample must be one of"),
        (["--out", "file/x/y"], "cannot write"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "generate"])
def test_what_cannot_be_done_is_said_in_one_line(cli, command, arguments, words, tmp_path, folder):
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    if "--model" not in arguments:
        arguments = [*arguments, "--model", folder]
    result = cli(command, *arguments, "--steps", 2, "a cat")
    assert result.exit_code == 2
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output


def test_a_model_of_ones_own_needs_a_prompt(cli, folder):
    result = cli("generate", "--model", folder)
    assert result.exit_code == 2 and "give at least one prompt" in result.stderr


def test_help_and_version(cli):
    assert "compare" in cli("--help").output and "--ratio" in cli("compare", "--help").output
    from tomesd_plus import __version__

    assert __version__ in cli("--version").output
