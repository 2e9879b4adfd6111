import os
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
WRITES = {
    "quickstart.py": ["quickstart.png"],
    "report.py": [],
    "plot_schedules.py": ["schedules.png"],
    "with_feature_cache.py": [
        f"{name}.png" for name in ("untouched", "cache-and-merging", "quality", "balanced", "fast")
    ],
    "from_tomesd.py": ["tomesd.png", "tomesd_plus.png"],
    "evaluate_fid.py": ["evaluate_fid"],
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} - {"__init__.py"} == set(WRITES)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_examples_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert sorted(os.listdir(tmp_path)) == sorted(WRITES[name])
    if name == "report.py":
        out = capsys.readouterr().out
        assert "Tokens removed: " in out and "level 2" in out and out.count("noise level") == 10
