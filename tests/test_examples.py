import os
import runpy
from pathlib import Path

import pytest

from examples.front import in_the_time
from examples.train_tiny.data import FONT_PATHS
from tomesd_plus.vision.versions import OLDEST, is_too_old

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
    "adaptive_ratio.py": ["adaptive-ratio.csv"],
    "cache_steps.py": ["cache-steps.csv"],
    "step_costs.py": ["step-costs-tiny.csv"],
    "merge_efficiency.py": ["merge-efficiency.csv"],
    "quantization.py": ["quantization.csv"],
    "proportional_attention.py": ["proportional-attention.csv"],
    "transformer_blocks.py": ["transformer-blocks.csv"],
    "transformer_proxy.py": ["transformer-proxy.csv"],
    "vision.py": ["vision.png"],
    "vision_accuracy.py": ["vision-accuracy.csv"],
    "vision_threads.py": ["vision-threads.csv"],
    "vision_saliency.py": [],  # needs a package and pictures of its own, and says so
    "tune.py": ["tuned.json", "tuned.png", "untouched.png"],
    "tune_methods.py": ["tune-methods.csv"],
    "preset_table.py": ["presets.csv", "presets.md"],
    "front.py": ["front.csv", *(f"front-dpm++2m-{each}.json" for each in ("2", "2.5", "3", "4"))],
}
SLOW = (
    "adaptive_ratio.py",
    "evaluate_fid.py",
    "from_tomesd.py",
    "quantization.py",
    "transformer_proxy.py",
    "tune.py",
    "tune_methods.py",
    "front.py",
    "preset_table.py",
    "with_feature_cache.py",
    "vision_accuracy.py",
)
NEEDS_FONT = ("vision_accuracy.py",)
OLD = is_too_old()  # where merging in vision towers is refused
RUNS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in WRITES]


def test_every_example_is_run():
    with_pruna = {path.name for path in EXAMPLES.glob("pruna_*.py")}  # which make test-pruna runs
    assert {path.name for path in EXAMPLES.glob("*.py")} - {"__init__.py"} - with_pruna == set(WRITES)


@pytest.mark.parametrize("name", RUNS)
def test_examples_run(name, tmp_path, monkeypatch, capsys):
    if name.startswith("vision") and OLD:
        pytest.skip(f"merging in vision towers needs transformers {OLDEST}")
    if name in NEEDS_FONT and not any(path.exists() for path in FONT_PATHS):
        pytest.skip("Noto Color Emoji is missing: apt-get install fonts-noto-color-emoji")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert sorted(os.listdir(tmp_path)) == sorted(WRITES[name])
    if name == "report.py":
        out = capsys.readouterr().out
        assert "Tokens removed: " in out and "level 2" in out and out.count("noise level") == 10


def test_fewer_steps_are_compared_in_equal_time():
    fewer = [("FFFF", "4.00", "20"), ("F" * 8, "2.00", "40"), ("Align Your Steps", "2.00", "99")]
    rows = [{"kind": "fewer steps", "plan": plan, "speed-up": speed, "PSNR dB": psnr} for plan, speed, psnr in fewer]
    rows += [{"kind": "tuned", "plan": "FFF", "speed-up": "3.00", "PSNR dB": "99"}]
    between = in_the_time(rows, 16 / 6)  # six steps' time
    assert between is not None and abs(between - 30) < 1e-9
    assert in_the_time(rows, 4.0) == 20 and in_the_time(rows, 2.0) == 40
    assert in_the_time(rows, 4.2) is None and in_the_time(rows, 1.9) is None
