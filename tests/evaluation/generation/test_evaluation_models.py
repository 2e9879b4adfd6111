"""Which device a model goes to, and what is left off it."""

import pytest
import torch
from conftest import make_pipeline

from tomesd_plus.cli import common
from tomesd_plus.evaluation.generation import load_model, models
from tomesd_plus.evaluation.generation.devices import local_device


def test_a_launched_process_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [local_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [local_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert local_device() == "cuda:3"


def test_the_gpu_becomes_the_current_one(monkeypatch):
    class Pipe:
        unet = None

        def to(self, device):
            assert current == [torch.device("cuda:3")] and device == "cuda:3"
            return self

        def set_progress_bar_config(self, disable):
            pass

    current = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(models, "load_tiny_pipeline", lambda dtype, device: Pipe())
    load_model("tiny", "cuda")
    assert current == [torch.device("cuda:3")]


@pytest.mark.parametrize("keep", [True, False])
def test_the_safety_checker_can_be_left_off(monkeypatch, keep):
    pipe = make_pipeline("sd")
    pipe.register_modules(safety_checker=pipe.vae)  # any module
    monkeypatch.setattr(models, "load_tiny_pipeline", lambda dtype, device: pipe)
    pipe = load_model("tiny", safety_checker=keep)
    assert (pipe.safety_checker is not None) is keep


def test_too_little_memory_is_said_in_one_line(capsys):
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), RuntimeError("can't allocate memory: 9")):
        with pytest.raises(common.typer.Exit):
            common.run(lambda error=error: (_ for _ in ()).throw(error))
        assert "out of memory: " in (text := capsys.readouterr().err) and len(text.splitlines()) == 1
    with pytest.raises(RuntimeError, match="another"):
        common.run(lambda: (_ for _ in ()).throw(RuntimeError("another")))
