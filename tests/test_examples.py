import csv
import os
import runpy
from pathlib import Path

import pytest

from examples import front
from examples.train_tiny.data import FONT_PATHS
from tomesd_plus.evaluation.configurations import parse_configuration
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
    "front.py": ["grid.csv", "grid.md", "grid.png"],
    "adaptive_ratio.py": ["adaptive-ratio.csv"],
    "cache_steps.py": ["cache-steps.csv"],
    "merge_efficiency.py": ["merge-efficiency.csv"],
    "quantization.py": ["quantization.csv"],
    "proportional_attention.py": ["proportional-attention.csv"],
    "transformer_blocks.py": ["transformer-blocks.csv"],
    "transformer_proxy.py": ["transformer-proxy.csv"],
    "vision.py": ["vision.png"],
    "vision_accuracy.py": ["vision-accuracy.csv"],
    "vision_threads.py": ["vision-threads.csv"],
    "vision_saliency.py": [],  # needs a package and pictures of its own, and says so
    "tune_methods.py": ["tune-methods.csv"],
    "tuned_front.py": ["front.csv", *(f"front-dpm++2m-{each}.json" for each in ("2", "2.5", "3", "4"))],
}
SLOW = (
    "adaptive_ratio.py",
    "evaluate_fid.py",
    "from_tomesd.py",
    "quantization.py",
    "transformer_proxy.py",
    "tune_methods.py",
    "tuned_front.py",
    "with_feature_cache.py",
    "vision_accuracy.py",
)
NEEDS_FONT = ("vision_accuracy.py",)
OLD = is_too_old()  # where merging in vision towers is refused
RUNS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in WRITES]


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} - {"__init__.py"} == set(WRITES)


def test_the_fronts_speed_ups_are_of_whole_denoisings(tmp_path):
    measured = {("untouched", ""): 1, ("attn1", "0.5"): 1.25, ("cache 5", ""): 2.9, ("DeepCache 5", ""): 3,
                ("attn1 + cache 5", "0.5"): 3.2, ("preset fast", ""): 4.5, ("tomesd package", "0.5"): 1.05,
                ("attn1, full every 4", "0.5"): 1.1, ("as presets + cache 5", "0.75"): 4.0,
                ("as presets, skipped 0.5 + cache 5", "0.75"): 5.0}  # fmt: skip
    path = tmp_path / "cpu.csv"
    with path.open("w") as file:
        table = csv.writer(file)
        table.writerow([*front.WORKLOAD, "setting", "ratio", "speedup"])
        table.writerows([*front.WORKLOAD.values(), *setting, speedup] for setting, speedup in measured.items())
    speeds = front.Speeds(path)

    def speedup(text, steps=25):
        return speeds.of(parse_configuration(text), steps)

    assert speedup("steps: 10") == 2.5 and speedup("tomesd: 0.5") == 1.05 and speedup("preset: fast") == 4.5
    assert speedup("cache: 5") == pytest.approx(3)
    assert speedup("cache: {interval: 5, forecast: 0.85}") == pytest.approx(2.9)  # which the package has not
    assert speedup("cache: 5", 26) == pytest.approx(26 / (6 + 20 / 6))  # a cached step takes a sixth of a full one
    assert speedup("merge: 0.5") == 1.25 and speedup("merge: {ratio: 0.5, plan_per: block, full_steps: 4}") == 1.1
    assert speedup("merge: 0.5, cache: 5") == pytest.approx(3.2)
    as_presets = "merge: {ratio: 0.75, layers: [self_attention, cross_attention, mlp], full_steps: %s, "
    as_presets += "plan_per: block}, cache: {%s, forecast: 0.85}"
    six = "full_steps: [0, 4, 8, 12, 16, 20]"  # of times 1 and 1/16, or where skipped layers merge of 3/4 and 1/16
    assert speedup(as_presets % ("cache", "interval: 5")) == pytest.approx(4)
    assert speedup(as_presets % ("cache", six)) == pytest.approx(25 / (6 + 19 / 16))
    assert speedup(as_presets % ("{every: cache, ratio: 0.5}", six)) == pytest.approx(25 / (6 * 0.75 + 19 / 16))
    assert speedup(as_presets % ("{every: cache, ratio: 0.25}", six)) is None
    assert speedup("merge: {ratio: 0.75, full_steps: cache}, cache: 5") is None
    assert speedup("merge: {ratio: 0.5, plan_per: block, full_steps: 4}, cache: 5") is None
    assert speedup("merge: {ratio: 0.5, plan_per: block, full_steps: 4, layers: [self_attention, mlp]}") is None
    assert speedup("merge: 0.25") is speedup("cache: 4") is None
    assert speedup("merge: {ratio: 0.5, layers: [self_attention, mlp]}") is None
    names = {"steps: 10": "fewer steps", "cache: 5": front.PEERS[1], "merge: 0.5, cache: 5": "merging and cache"}
    assert {text: front.kind(parse_configuration(text)) for text in names} == names


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
    for published in {"front.py": ["grid.csv", "grid.md"]}.get(name, []):
        assert Path(published).read_text() == (EXAMPLES.parent / "results" / published).read_text()
    if name == "report.py":
        out = capsys.readouterr().out
        assert "Tokens removed: " in out and "level 2" in out and out.count("noise level") == 10
