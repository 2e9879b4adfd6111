"""The first pass in several processes, and killed: the same files, byte for byte."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_pipeline
from typer.testing import CliRunner

from tomesd_plus.cli import app


def contents(folder):
    """Every file below a folder: {path: bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A model in a folder, what to evaluate it with, and the finished evaluation of one process."""
    base = tmp_path_factory.mktemp("runs")
    make_pipeline("sd").save_pretrained(base / "model")
    (base / "prompts.txt").write_text("\n".join(f"a cat {letter}" for letter in "abcdefgh"))
    arguments = ["evaluate", "-c", "merge: 0.5", "--model", base / "model", "--prompts", base / "prompts.txt",
                 "--size", 32, "--steps", 2, "--features", "tiny", "--reference", "embedded", "--resamples", 5,
                 "--timed-runs", 1, "--device", "cpu", "--batch-size", 2]  # fmt: skip
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
def test_accelerate_launches_it_too(command):
    base, arguments = command
    out = started(base, "accelerate")
    options = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options, "--dynamo_backend", "no"]
    launch += ["-m", "tomesd_plus"]
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
