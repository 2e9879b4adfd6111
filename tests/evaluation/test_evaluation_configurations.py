"""Configurations as YAML, and what they do to a pipeline."""

import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import generate, hooks

from tomesd_plus.evaluation.configurations import Configuration, complete, load_configurations, parse_configuration
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.generation import Row, Sampling, compare
from tomesd_plus.evaluation.generation.timing import equal_time_rows
from tomesd_plus.evaluation.speed import Speed

EXAMPLES = Path(__file__).parents[2] / "examples"
ABLATION, GRID = EXAMPLES / "ablation.yaml", EXAMPLES / "grid.yaml"


def test_a_bare_value_is_the_main_option():
    short, long = parse_configuration("merge: 0.5"), parse_configuration("merge: {ratio: 0.5}, name: half")
    assert short.switches == long.switches == {"merge": {"ratio": 0.5}}
    assert (short.name, short.folder, long.name) == ("merge: 0.5", "merge-0.5", "half")
    assert parse_configuration("merge: , steps: 7").steps == 7
    assert parse_configuration("baseline").is_baseline


@pytest.mark.parametrize(
    "text", ["merge: 0.5", "merge: {ratio: 0.5, schedule: linear, more_at: clean}", "tomesd: 0.5"]
)
def test_a_configuration_merges_and_leaves_nothing_behind(pipe, text):
    before = generate(pipe)
    configuration = parse_configuration(text)
    with configuration.switched_on(pipe) as report:
        inside = generate(pipe)
        assert report.removed[1] == pytest.approx(0.5, abs=0.06)
    assert not torch.equal(inside, before)
    assert torch.equal(generate(pipe), before) and not hooks(pipe)


def test_a_schedule_merges_where_it_says(pipe):
    with parse_configuration("merge: {ratio: 0.4, schedule: cosine, more_at: clean}").switched_on(pipe) as report:
        generate(pipe)
        shares = [step.removed[1] for step in report.steps]
    assert shares[-1] > shares[0] + 0.2


def test_an_adaptive_ratio_is_an_option_like_others(pipe):
    configurations = [
        parse_configuration(f"merge: {{ratio: {{similarity: {similarity}, ratios: [0, 0.25]}}}}")
        for similarity in (-1, 1)
    ]
    skipped = parse_configuration("merge: {ratio: {1: 0.5}, full_steps: {every: cache, ratio: {similarity: 0.9}}}")
    assert all(configuration.depends_on_batch for configuration in [*configurations, skipped])
    rows = compare(pipe, ["a", "b"], configurations, Sampling(2, 1.0, 64, 64)).rows
    assert [row.removed[1] for row in rows] == [0.25, 0.0]
    assert [len(row.removed_by_prompt) for row in rows] == [2, 2]


def test_the_share_removed_is_the_mean_over_prompts():
    row = Row("adaptive", 2, removed_by_prompt=[{1: 0.5}, {1: 0.25, 2: 0.5}])
    assert row.removed == {1: 0.375, 2: 0.25}


def test_switches_go_together(pipe):
    with parse_configuration("merge: 0.5").switched_on(pipe):
        merged = generate(pipe)
    with parse_configuration("cache: 2").switched_on(pipe):
        cached = generate(pipe)
    with parse_configuration("merge: 0.5, cache: 2").switched_on(pipe) as report:
        both = generate(pipe)
        assert report.merged
    assert not torch.equal(both, merged) and not torch.equal(both, cached)


def test_deepcache_is_the_package_of_that_name(pipe):
    pytest.importorskip("DeepCache")
    before = generate(pipe)
    with parse_configuration("deepcache: 2").switched_on(pipe):
        inside = generate(pipe)
    assert not torch.equal(inside, before) and torch.equal(generate(pipe), before)


def test_a_missing_peer_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "DeepCache", None)
    with pytest.raises(EvaluationError, match="needs DeepCache: pip install DeepCache"):
        parse_configuration("deepcache: 3")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mrege: 0.5", "unknown switch 'mrege'"),
        ("merge: 0.9", "0.9 is more than cells of 2 × 2 tokens allow"),
        ("merge: {ration: 0.5}", "ration"),
        ("merge: {ratio: 0.5, more_at: dirty}", "dirty"),
        ("merge: {ratio: {similarity: 2}}", "similarity must lie in"),
        ("merge: {ratio: 0.5, more_at: dusk}", "'noisy' or 'clean'"),
        ("merge: {ratio: 0.5, cell_size: [0, 2]}", "cell_size must be two whole numbers"),
        ("tomesd: {rato: 0.5}", "rato"),
        ("tomesd: abc", "a ratio must be a number"),
        ("deepcache: abc", "interval must be a whole number"),
        ("merge: 0.5, steps: 0", "steps"),
        ("merge: [", "cannot read the configuration"),
        ("", "a configuration is a mapping"),
        ("name: '!!', merge: 0.5", "letter or a digit"),
    ],
)
def test_what_is_wrong_is_said_when_it_is_read(text, words):
    with pytest.raises(EvaluationError, match=words):
        parse_configuration(text)


def test_a_file_holds_a_list(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("- baseline\n- merge: 0.5\n- {name: tomesd's way, tomesd: 0.5}\n")
    assert [configuration.name for configuration in load_configurations(path)] == [
        "baseline", "merge: 0.5", "tomesd's way",
    ]  # fmt: skip
    for broken in ("just text", "[]", "a: [", "configurations: 3"):
        path.write_text(broken)
        with pytest.raises(EvaluationError, match=r"c\.yaml"):
            load_configurations(path)
    with pytest.raises(EvaluationError, match=r"no\.yaml"):
        load_configurations(tmp_path / "no.yaml")


def test_the_ablation_compares_schedules_of_one_mean(pipe):
    configurations = load_configurations(ABLATION)
    assert len(complete(configurations)) == 33
    means = {}
    for configuration in configurations:
        if configuration.name.endswith(", 0.5"):
            with configuration.switched_on(pipe) as report:
                generate(pipe, num_inference_steps=20)
                means[configuration.name] = sum(step.removed[1] for step in report.steps) / len(report.steps)
    assert len(means) == 5 and all(mean == pytest.approx(0.5, abs=0.02) for mean in means.values())


def test_baseline_and_noise_floor_come_by_themselves():
    chosen = complete([parse_configuration("merge: 0.5"), parse_configuration("baseline")])
    assert [configuration.name for configuration in chosen] == ["baseline", "merge: 0.5", "another seed (noise floor)"]
    assert len(complete(chosen[1:2], noise_floor=False)) == 2
    with pytest.raises(EvaluationError, match="share a folder"):
        complete([parse_configuration("merge: 0.5"), Configuration("merge 0.5", {"merge": {}})])


def test_rows_of_equal_time_are_for_what_is_faster():
    """Of a second 0.8 s are steps; what encodes and decodes does not become less with them."""

    def speed(speedup, batch_size=1):
        return Speed(1.0, 0.04 * batch_size, speedup, speedup, speedup, 1, batch_size, 0.0)

    configurations = complete([parse_configuration(f"merge: {ratio}") for ratio in (0.25, 0.5, 0.75)])
    for batch_size in (1, 4):
        speeds = {"baseline": speed(1.0, batch_size), "merge-0.25": speed(0.9), "merge-0.5": speed(1.25),
                  "merge-0.75": speed(2.0), "another-seed-noise-floor": speed(1.6)}  # fmt: skip
        rows = equal_time_rows(configurations, speeds, Sampling(steps=20))
        assert [row.steps for row in rows] == [15, 7]
    assert equal_time_rows(configurations, {}, Sampling(steps=20)) == []


def test_the_grid_has_every_interval_ratio_and_direction():
    rows = load_configurations(GRID)
    merged, cached = [], []
    for each in rows:
        merge, cache = each.switches.get("merge", {}), each.switches.get("cache", {})
        if not merge.keys() <= {"ratio", "schedule", "more_at", "cell_size"} or not cache.keys() <= {"interval"}:
            continue
        if merge:
            merged.append((cache.get("interval", 1), merge["ratio"], merge.get("more_at", "constant")))
        elif cache:
            cached.append(cache["interval"])
    assert sorted(merged) == sorted(product((1, 2, 3, 5), (0.25, 0.5, 0.75), ("constant", "noisy", "clean")))
    assert sorted(cached) == [2, 3, 4, 5, 7]
