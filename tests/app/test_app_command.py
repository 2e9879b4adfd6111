"""How the app is started: the command, the module, a Space."""

import runpy
import socket
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import make_pipeline
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from tomesd_plus.cli import app

ROOT = Path(__file__).parents[2]


def test_without_gradio_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("gradio_app.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["app"])
    assert result.exit_code == 2 and "pip install 'gradio>=6,<7'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_it_starts_with_the_model_and_address_that_were_asked_for(monkeypatch, tmp_path):
    gradio = pytest.importorskip("gradio")
    launched = {}

    def launch(self, **options):
        launched.update(options, demo=self)

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    make_pipeline("sdxl").save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(
        app, ["app", "--model", str(tmp_path / "model"), "--host", "0.0.0.0", "--port", "7999", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    assert (launched["server_name"], launched["server_port"]) == ("0.0.0.0", 7999)
    fields = {block.elem_id: block for block in launched["demo"].blocks.values()}
    assert fields["width"].value == 32 and fields["levels"].choices == [("down to 1/2", 2)]


def test_a_model_that_cannot_be_loaded_is_told_in_one_line():
    pytest.importorskip("gradio")
    result = CliRunner().invoke(app, ["app", "--model", "no/such-model", "--device", "cpu"])
    assert result.exit_code == 2 and "cannot load model 'no/such-model'" in result.stderr


def test_a_port_that_is_taken_is_told_in_one_line():
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["app", "--port", str(port), "--device", "cpu"])
    assert result.exit_code == 2 and f"cannot listen on 127.0.0.1, port {port}" in result.stderr


@pytest.mark.parametrize("start", [runpy.run_module, runpy.run_path])  # the second as a Space does
def test_the_module_takes_the_same_options(start, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gradio_app", "--help"])
    with pytest.raises(SystemExit) as ended:
        start(
            "gradio_app" if start is runpy.run_module else str(ROOT / "gradio_app" / "__main__.py"),
            run_name="__main__",
        )
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--model", "--device", "--dtype", "--host", "--port"))


def test_a_space_gets_the_tested_gradio_and_all_dependencies():
    front = yaml.safe_load((ROOT / "gradio_app" / "README.md").read_text().split("---")[1])
    assert (ROOT / front["app_file"]).is_file() and front["sdk"] == "gradio"
    assert f"gradio=={front['sdk_version']}" in (ROOT / "constraints.txt").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(front["python_version"])
    needed = [*project["dependencies"], *project["optional-dependencies"]["app"]]
    listed = (ROOT / "gradio_app" / "requirements.txt").read_text().split()
    assert [Requirement(line) for line in listed] == [Requirement(line) for line in needed]
