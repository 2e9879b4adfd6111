"""The benchmark of vision towers: shapes, settings, the ideal, tables; never a time."""

import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

from tomesd_plus.benchmark import SUITES, TOWERS, UNTOUCHED, Protocol, TowerSetting, Workload, load_rows, measure
from tomesd_plus.benchmark import tower_settings as settings_of
from tomesd_plus.benchmark.towers import fewer_tokens_at_no_cost, tower_runner
from tomesd_plus.cli import app
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.vision import TowerConfig
from tomesd_plus.vision.versions import OLDEST, is_too_old

CPU = torch.device("cpu")
QUICK = Protocol(repeats=1, run_seconds=0)
PARAMETERS = {"vit-b16": 86.4, "vit-l16": 304.4, "clip-b32": 87.5, "clip-l14": 303.2, "dinov2-s": 22.1}  # millions

pytestmark = pytest.mark.skipif(is_too_old(), reason=f"merging in towers needs transformers {OLDEST}")


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["benchmark", *map(str, arguments)])


def test_shapes_are_those_of_the_published_models():
    for name, millions in PARAMETERS.items():
        shape = TOWERS[name]
        config = getattr(transformers, f"{shape.kind}Config")(image_size=shape.image_size, **shape.config)
        with torch.device("meta"):
            model = getattr(transformers, f"{shape.kind}Model")(config)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_each_method_stands_beside_its_ideal():
    settings = settings_of(["merging", "evit", "ats"], [4, (2, -1.0)])
    keys = [setting.key[:2] for setting in settings]
    assert keys[:3] == [("untouched", ""), ("ideal: fewer tokens", "r = 4"), ("merging", "r = 4")]
    assert len(keys) == 9 and ("ats", "r = (2, -1)") in keys  # one ideal for the methods of each r
    measured = measure(Workload("vit-tiny", 32, 2), settings, CPU, QUICK)
    assert [each.setting for each in measured] == settings and all(len(each.seconds) == 1 for each in measured)
    for each in measured:
        assert each.matching_seconds is each.merging_seconds is None  # by another clock than the time


@pytest.mark.parametrize("method", ["merging", "evit", "ats"])
def test_the_ideal_runs_on_as_many_tokens(method):
    setting = TowerSetting(method, r=(2, -1.0))
    model = TOWERS["vit-tiny"].build(32, torch.float32, CPU)
    seen = {"ideal": [], "merged": []}
    for name, one in (("ideal", setting.ideal), ("merged", setting)):
        with tower_runner(model, one, 32, 2, False) as runner:
            for layer in runner.model.layers:
                layer.mlp.fc1.register_forward_hook(lambda m, args, y, name=name: seen[name].append(args[0].shape[1]))
            assert runner.run(1) > 0
        assert not any(module._forward_hooks for module in model.modules())  # the runner's is a copy
    assert seen["ideal"] == seen["merged"] == [13, 13]


def test_the_ideal_leaves_nothing_behind():
    model = TOWERS["vit-tiny"].build(32, torch.float32, CPU)
    pictures = torch.randn(1, 3, 32, 32)
    before = model(pictures).last_hidden_state
    with fewer_tokens_at_no_cost(model, TowerConfig(r=3)):
        assert model(pictures).last_hidden_state.shape == (1, 11, 64)
    assert torch.equal(model(pictures).last_hidden_state, before)


def test_the_command_writes_tables_and_a_plot(cli, tmp_path):
    result = cli("--shape", "vit-tiny", "--r", 4, "--r", "2,-1", "--method", "merging", "--method", "evit",
                 "--batch", 2, "--repeats", 1, "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "images / s" in result.output and "PSNR" not in result.output
    rows = load_rows(tmp_path / "benchmark" / "benchmark.csv")
    assert len(rows) == 7 and all(row.step_ms and float(row.images_per_second) > 0 for row in rows)
    assert {row.note for row in rows[1:]} == {f"transformers {transformers.__version__}"}
    table = (tmp_path / "benchmark" / "benchmark.md").read_text()
    assert "| method | r | images / s |" in table and "| evit | (2, -1) |" in table and "UNet step" not in table
    assert Image.open(tmp_path / "benchmark" / "benchmark.png").height > 400


@pytest.mark.slow
def test_compiled_towers_have_no_ideal(cli, tmp_path, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="eager", **options))
    result = cli("--shape", "vit-tiny", "--r", 4, "--compile", "--repeats", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    rows = load_rows(tmp_path / "benchmark" / "benchmark.csv")
    assert [(row.setting, row.mode) for row in rows] == [("untouched", "compiled"), ("merging", "compiled")]
    assert all(row.step_ms for row in rows)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shape", "vit-b16", "--ratio", 0.5, "--levels", 2], "--levels, --ratio are for UNets"),
        (["--shape", "sd15", "--r", 8], "sd15 is a UNet: --r are for vision towers"),
        (["--shape", "vit-tiny", "--r", "x"], "not 'x'"),
        (["--shape", "vit-tiny", "--r", "-4"], "must not be negative"),
        (["--shape", "vit-tiny", "--r", "8,3"], "must lie in [-1, 1]"),
        (["--shape", "vit-tiny", "--method", "prune"], "choose from merging, evit, ats"),
        (["--shape", "vit-tiny", "--size", 33], "multiples of 8"),
        (["--shape", "vit-tiny", "--batch", 0], "at least one sample"),
        (["--shape", "vit"], "unknown shape 'vit'"),
        (["--suite", "vision", "--method", "evit"], "a suite has its own method"),
    ],
)
def test_wrong_options_are_refused_in_words(cli, arguments, words):
    result = cli(*arguments)
    assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output


def test_the_suite_has_the_published_settings():
    tasks = SUITES["vision"]().tasks
    assert {task.workload.shape for task in tasks} == set(PARAMETERS)
    assert {setting.r for setting in tasks[0].settings if setting != UNTOUCHED} == {8, 13, 16, (8, -1)}
    with pytest.raises(EvaluationError, match="must not be negative"):
        settings_of(["merging"], [-1])
