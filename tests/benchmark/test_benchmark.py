"""The benchmark: what is measured and resumed, rows, fidelity and suites; never a time."""

import sys
from dataclasses import replace

import pytest
import torch

from tomesd_plus.benchmark import (
    NAMED,
    SUITES,
    UNTOUCHED,
    Measured,
    Protocol,
    Suite,
    Workload,
    load_rows,
    measure,
    run_suite,
    settings_from,
    task,
    with_ideals,
)
from tomesd_plus.benchmark import run as run_module
from tomesd_plus.benchmark.fidelity import embedded_psnr
from tomesd_plus.benchmark.rows import make_rows
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.matching import MergePlan
from tomesd_plus.merging.planner import Planner

CPU = torch.device("cpu")
TINY = Workload("tiny", 64)
QUICK = Protocol(repeats=1, run_seconds=0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of the gate


def suite(*names, workload=TINY, ratios=(0.5,)):
    return Suite((task(workload, names, ratios),), repeats=1, run_seconds=0, prompts=0)


# Measuring --------------------------------------------------------------------------------------------------------


def test_every_setting_is_measured_beside_the_others():
    names = [name for name in NAMED if "gate" not in name and name != "run"]  # which is of transformers
    settings = with_ideals(settings_from(names, [0.5]))
    order = []
    measured = measure(replace(TINY, size=32), settings, CPU, replace(QUICK, repeats=2), order.append)
    assert [each.setting for each in measured] == settings
    assert order == [setting.name for setting in settings] * 3  # preparing, and two rounds in turn
    for each in measured:
        assert not each.failure and len(each.seconds) == 2 and each.memory_mib > 0
        assert each.calls == (5 if each.setting == UNTOUCHED else each.setting.cycle)  # a preset's are 25
        ours = bool(each.setting.switches.keys() & {"merge", "tomesd"}) or each.setting.name == "preset fast"
        assert [(each.matching_seconds or 0) > 0, (each.merging_seconds or 0) > 0] == [ours, ours]
    assert "timed" not in Planner.plan.__qualname__ + MergePlan.merge.__qualname__


def test_a_setting_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("tomesd.apply_patch", lambda *args, **options: 1 / 0)
        outcome = run_suite(suite("tomesd package", "attn1"), CPU, tmp_path, "a")
    rows = {row.setting: row for row in outcome.rows}
    assert rows["tomesd package"].note == "failed: ZeroDivisionError: division by zero"
    assert rows["attn1"].speedup and not rows["tomesd package"].speedup
    assert "failed" in (tmp_path / "a.md").read_text()
    again = {row.setting: row for row in run_suite(suite("tomesd package", "attn1"), CPU, tmp_path, "a").rows}
    assert again["tomesd package"].speedup and again["attn1"] == rows["attn1"]


def test_peers_that_are_not_installed_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "DeepCache", None)
    outcome = run_suite(suite("DeepCache 3", "cache 3"), CPU, tmp_path, "a")
    assert [row.setting for row in outcome.rows] == ["untouched", "cache 3"]
    assert len(outcome.left_out) == 1 and "pip install DeepCache" in outcome.left_out[0]


# Rows -------------------------------------------------------------------------------------------------------------


def test_merge_efficiency_is_of_paired_times():
    settings = with_ideals(settings_from(["attn1"], [0.5]))

    def rows_of(*times, psnr=40.0):
        measured = [Measured(setting, seconds, 1) for setting, seconds in zip(settings, times, strict=True)]
        return make_rows(TINY, measured, "x", {settings[2].key: psnr})

    rows = rows_of([10.0, 20.0, 10.0], [8.0, 16.0, 8.0], [8.5, 17.0, 9.0])
    assert [row.efficiency for row in rows] == ["", "", "0.75"]
    assert [row.speedup for row in rows] == ["1", "1.25", "1.176"]
    assert (rows[2].step_ms, rows[2].step_ms_low, rows[2].step_ms_high) == ("9000", "8500", "17000")
    assert (rows[2].speedup_low, rows[2].speedup_high, rows[2].psnr) == ("1.111", "1.176", "40")
    assert rows_of([1.0], [0.5], [1.5])[2].efficiency == "-1"
    assert rows_of([1.0], [1.0], [1.5])[2].efficiency == ""  # there is nothing to save


def test_finished_rows_stay_and_the_rest_is_measured(tmp_path, monkeypatch):
    asked = []

    def watched(workload, settings, *rest):
        asked.append(settings)
        return measure(workload, settings, *rest)

    monkeypatch.setattr(run_module, "measure", watched)
    first = run_suite(suite("attn1"), CPU, tmp_path, "a").rows
    again = run_suite(suite("attn1"), CPU, tmp_path, "a").rows
    assert again == first == load_rows(tmp_path / "a.csv") and len(asked) == 1
    more = run_suite(suite("attn1", "block"), CPU, tmp_path, "a").rows
    assert more[:3] == first and [row.setting for row in more[3:]] == ["ideal: block", "block"]
    assert [setting.name for setting in asked[1]] == ["untouched", "ideal: block", "block"]
    monkeypatch.setattr("tomesd_plus.benchmark.rows.__version__", "9")
    assert len(run_suite(suite("attn1"), CPU, tmp_path, "a").rows) == len(more) + 3


def test_what_is_stopped_keeps_its_workloads_and_goes_on(tmp_path):
    small = replace(TINY, size=32)
    both = replace(suite("attn1"), tasks=(*suite("attn1").tasks, *suite("attn1", workload=small).tasks))

    def stop(what, setting):
        if "32²" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(both, CPU, tmp_path, "a", stop)
    assert {row.size for row in load_rows(tmp_path / "a.csv")} == {"64"}
    late = run_suite(replace(both, minutes=0), CPU, tmp_path, "a")
    assert late.unfinished == [str(small)] and len(late.rows) == 3
    assert {row.size for row in run_suite(both, CPU, tmp_path, "a").rows} == {"64", "32"}


def test_a_task_may_have_fewer_rounds_than_its_suite_and_never_more(tmp_path):
    def runs(repeats, of_the_suite):
        each = replace(suite("attn1").tasks[0], repeats=repeats)
        path = tmp_path / f"{repeats} {of_the_suite}"
        path.mkdir()
        whole = replace(suite("attn1"), tasks=(each,), repeats=of_the_suite)
        return {row.runs for row in run_suite(whole, CPU, path, "a").rows}

    assert [runs(1, 2), runs(3, 2), runs(None, 2)] == [{"1"}, {"2"}, {"2"}]


def test_a_file_of_another_program_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("name,value\nx,1\n")
    with pytest.raises(EvaluationError, match="not this benchmark's"):
        run_suite(suite("attn1"), CPU, tmp_path, "a")


# Fidelity ---------------------------------------------------------------------------------------------------------


def test_fidelity_is_computed_once_and_kept(tmp_path, monkeypatch):
    settings, path = with_ideals(settings_from(["attn1"], [0.25, 0.5])), tmp_path / "fidelity.json"
    psnr = embedded_psnr(settings, path, CPU, prompts=1, steps=2)
    assert set(psnr) == {s.key for s in settings if "ideal" not in s.switches and s != UNTOUCHED}
    assert psnr["attn1", "0.25", "1"] > psnr["attn1", "0.5", "1"] > 20
    monkeypatch.setattr("tomesd_plus.benchmark.fidelity.load_tiny_pipeline", lambda **options: pytest.fail("again"))
    assert embedded_psnr(settings, path, CPU, prompts=1, steps=2) == psnr
    assert embedded_psnr(settings, path, CPU, prompts=0) == {}


# Suites ---------------------------------------------------------------------------------------------------------


def test_suites_hold_what_is_published():
    for make in SUITES.values():
        for each in make().tasks:
            assert each.settings[0] == UNTOUCHED and len({s.key for s in each.settings}) == len(each.settings)
            for setting in each.settings:
                setting.check()
    gpu = {(w.shape, w.size, w.batch, w.mode) for w in (each.workload for each in SUITES["gpu"]().tasks)}
    assert gpu >= {("sd15", size, batch, "eager") for size in (512, 1024, 2048) for batch in (2, 8)}
    assert gpu >= {("sdxl", 1024, 2, "eager"), ("sdxl", 2048, 2, "eager"), ("sd15", 1024, 2, "compiled")}
    assert SUITES["gpu"]().minutes == 10
    assert {(w.size, w.dtype) for w in (each.workload for each in SUITES["cpu"]().tasks)} >= {(512, "float32")}
