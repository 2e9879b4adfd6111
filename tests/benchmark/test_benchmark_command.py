"""The benchmark's command: its tables and its options; never a time."""

import csv

import pytest
from diffusers import UNet2DConditionModel
from PIL import Image
from typer.testing import CliRunner

from tomesd_plus.benchmark import SUITES, load_rows
from tomesd_plus.cli import app


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of the gate


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["benchmark", *map(str, arguments)])


@pytest.mark.slow
def test_the_smoke_suite_writes_its_tables_and_a_plot(cli, tmp_path, monkeypatch):
    compile_blocks = UNet2DConditionModel.compile_repeated_blocks

    def run_graphs_as_they_are(unet, **options):
        compile_blocks(unet, **options, backend="eager")

    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", run_graphs_as_they_are)
    result = cli("--suite", "smoke", "--device", "cpu", "--out", "made")
    assert result.exit_code == 0, result.output
    with (tmp_path / "made" / "smoke.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = {s.key for each in SUITES["smoke"]().tasks for s in each.settings}
    assert {(row["setting"], row["ratio"], row["levels"]) for row in rows} == wanted
    assert {row["mode"] for row in rows} == {"eager", "compiled"} and {row["batch"] for row in rows} == {"2", "8"}
    assert all(row["step_ms"] and row["speedup"] and row["memory_mib"] for row in rows)
    without = ("ideal", "untouched", "attn1, gate")
    assert all(bool(row["psnr"]) == (not row["setting"].startswith(without)) for row in rows)
    assert "Weights are random" in (tmp_path / "made" / "smoke.md").read_text()
    assert Image.open(tmp_path / "made" / "smoke.png").height > 400
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        "smoke.csv", "smoke.md", "smoke.png", "fidelity.json",
    }  # fmt: skip


def test_presets_and_caches_are_options(cli, tmp_path):
    result = cli("--shape", "tiny", "--size", 32, "--preset", "fast", "--cache-interval", 2, "--cache-interval", 4,
                 "--device", "cpu", "--repeats", 1, "--prompts", 0)  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = load_rows(tmp_path / "benchmark" / "benchmark.csv")
    calls = {row.setting: int(row.calls) for row in rows}
    assert calls.pop("preset: fast") == 25 and calls.pop("untouched") >= 5
    cycles = {"cache: 2": 2, "deepcache: 2": 2, "cache: 4": 4, "deepcache: 4": 4}
    assert calls.keys() == cycles.keys() and all(calls[name] % cycle == 0 for name, cycle in cycles.items())


def test_single_settings(cli, tmp_path):
    result = cli("--shape", "tiny", "--size", 32, "--size", 64, "--batch", 1, "--ratio", 0.25, "--setting", "block",
                 "--dtype", "bfloat16", "--device", "cpu", "--repeats", 1, "--prompts", 0)  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = load_rows(tmp_path / "benchmark" / "benchmark.csv")
    assert {(row.size, row.batch, row.dtype) for row in rows} == {("32", "1", "bfloat16"), ("64", "1", "bfloat16")}
    assert "tiny 64², batch 1, bfloat16, eager" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "sd9"], "unknown shape 'sd9'"),
        (["--suite", "tpu"], "unknown suite 'tpu'"),
        (["--suite", "smoke", "--size", "64"], "a suite has its own size"),
        (["--suite", "gpu"], "needs a GPU"),
        (["--setting", "attn9"], "unknown setting 'attn9'"),
        (["--ratio", "0.8"], "0.8"),
        (["--ratio", "1.5"], "1.5"),
        (["--size", "65"], "multiples of 8"),
        (["--batch", "0"], "at least one sample"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
        (["--out", "file/x"], "cannot write"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(cli, arguments, words, tmp_path):
    (tmp_path / "file").write_text("")
    device = [] if "--device" in arguments else ["--device", "cpu"]
    shape = [] if {"--shape", "--suite"} & set(arguments) else ["--shape", "tiny"]
    result = cli(*arguments, *device, *shape)
    assert result.exit_code == 2
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
