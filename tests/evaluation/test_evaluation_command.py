"""``tomesd-plus evaluate`` and ``report`` as commands: what they refuse, and shards one after the other."""

import json

import pytest
from conftest import make_pipeline
from typer.testing import CliRunner

from tomesd_plus.cli import app
from tomesd_plus.evaluation.scoring import load_results


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "generate", "--features", "tiny"], "'evaluate generate' does not take --features"),
        (["evaluate", "score", "--steps", 3, "--limit", 2], "does not take --limit, --steps"),
        (["evaluate", "score", "--out", "nowhere"], "nowhere holds no evaluation"),
        (["evaluate", "-c", "merge: 0.9"], "a ratio of 0.9 is more than cells of 2 × 2 tokens allow"),
        (["evaluate", "--configurations", "none.yaml"], "cannot read configurations from none.yaml"),
        (["evaluate", "--prompts", "none.txt"], "cannot read prompts from none.txt"),
        (["evaluate", "--shard", "2/2"], "a shard is i/n"),
        (["evaluate", "--features", "no/clip"], "cannot load the CLIP model 'no/clip'"),
        (["evaluate", "--shard", "0/2", "--lpips"], "a shard is not scored, so --lpips does nothing"),
        (["evaluate", "--timed-runs", 0, "--equal-time"], "--equal-time needs the speeds"),
        (["evaluate", "--features", "tiny", "--inception-weights", "w"], "needs --features inception"),
        (["evaluate", "--features", "tiny", "--features", "inception"], "inception needs --reference"),
        (["evaluate", "--model", "m", "--prompts", "p.txt", "--column", "c"], "cannot read prompts"),
        (
            ["evaluate", "--features", "inception", "--reference", "r", "--inception-weights", "none.pth"],
            "there is no file none.pth",
        ),
        (["evaluate", "generate", "--model", "no/model"], "cannot load model 'no/model'"),
        (["report", "nowhere"], "nowhere has no results.json"),
        (["report", "a", "b"], "need --out"),
        (["report", "a", "./a", "--out", "c"], "named once"),
        (["report", "a", "b", "--out", "a"], "would overwrite"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(cli, arguments, words):
    result = cli(*arguments)
    assert result.exit_code == 2
    notes = ("LPIPS is left out", "No distances")
    lines = [line for line in result.stderr.strip().splitlines() if not any(note in line for note in notes)]
    assert words in lines[-1] and len(lines) == 1
    assert "Traceback" not in result.output


def test_a_folder_of_other_programs_results_is_said(cli, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"accuracy": 1}))
    result = cli("report", tmp_path)
    assert result.exit_code == 2 and "is not an evaluation's" in result.stderr


def test_the_passes_of_a_shard_at_a_time(cli, tmp_path):
    make_pipeline("sd").save_pretrained(tmp_path / "model")
    common = ["--model", "model", "--limit", 3, "--size", 32, "--steps", 2, "--timed-runs", 0, "-c", "merge: 0.5"]
    assert cli("evaluate", "generate", *common, "--shard", "0/2").exit_code == 0
    unfinished = cli("evaluate", "score", "--features", "tiny")
    assert unfinished.exit_code == 2 and "images are yet to be generated: 1 of 'baseline'" in unfinished.stderr
    last = cli("evaluate", *common, "--shard", "1/2")
    assert last.exit_code == 0 and "Once all shards are done" in last.stderr
    result = cli("evaluate", "score", "--features", "tiny", "--no-lpips")
    assert result.exit_code == 0, result.output
    assert "merge: 0.5" in result.stdout and {row.images for row in load_results(tmp_path / "evaluation")} == {3}
    refused = cli("evaluate", "generate", *common[:-1], "merge: 0.25", "--guidance", 3)
    assert refused.exit_code == 2 and "was made with another configuration" in refused.stderr
