"""Registering: once, for configurations of before too, and named by saved models where it is missing."""

import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pruna_tools
from conftest import generate, make_pipeline
from pruna import AlgorithmRegistry, SmashConfig, smash
from pruna.algorithms.base.tags import AlgorithmTag
from pruna.logging.logger import pruna_logger
from pruna_tools import IN_A_FRESH_PROCESS

import tomesd_plus.integrations.pruna as plugin
from tomesd_plus import merging_report
from tomesd_plus.integrations.pruna.base import NEEDED

ROOT = Path(__file__).parents[2]
OURS = ("tome_sd", "tome_cache", "tome_vision")


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS + code], capture_output=True, text=True, cwd=ROOT)


def test_registering_twice_does_nothing():
    before = {name: AlgorithmRegistry[name] for name in OURS}
    deepcache = list(AlgorithmRegistry["deepcache"].compatible_after)
    plugin.register()
    importlib.reload(plugin)
    assert {name: AlgorithmRegistry[name] for name in OURS} == before
    assert list(AlgorithmRegistry["deepcache"].compatible_after) == deepcache and deepcache.count("tome_sd") == 1


def test_groups_and_references():
    groups = {name: AlgorithmRegistry[name].group_tags for name in OURS}
    assert groups["tome_sd"] == groups["tome_vision"] == [AlgorithmTag.PRUNER]
    assert groups["tome_cache"] == [AlgorithmTag.CACHER]
    for name in OURS:
        algorithm = AlgorithmRegistry[name]
        assert algorithm.references and all(url.startswith("https://") for url in algorithm.references.values())
        assert all(each.meta["desc"] for each in algorithm.hyperparameters)


def test_the_requested_names():
    for name in ("tome_sd", "tome_vision"):
        names = {each.name.removeprefix(f"{name}_") for each in AlgorithmRegistry[name].hyperparameters}
        assert {"method", "reduction_ratio", "adaptive"} <= names


def test_compatibility_is_declared_on_both_sides():
    for name in OURS:
        algorithm = AlgorithmRegistry[name]
        for other in algorithm.get_algorithms_to_run_before():
            assert name in AlgorithmRegistry[other].get_algorithms_to_run_after()
        for other in algorithm.get_algorithms_to_run_after():
            assert name in AlgorithmRegistry[other].get_algorithms_to_run_before()


def test_a_configuration_of_before_the_import_goes_on():
    done = run(
        """
import copy, pickle
before = SmashConfig({"deepcache": {"interval": 4}, "torchao": {"quant_type": "int8wo"}}, device="cpu")
empty = SmashConfig(device="cpu")
copied, pickled = copy.deepcopy(before), pickle.loads(pickle.dumps(before))
import tomesd_plus.integrations.pruna
empty.add("tome_cache")
assert empty.get_active_algorithms() == ["tome_cache"]
assert before == copied == pickled
for each in (before, copied, pickled):
    each.add({"tome_sd": {"reduction_ratio": 0.25}})
    assert each["deepcache_interval"] == 4 and each["torchao_quant_type"] == "int8wo"
    assert sorted(each.get_active_algorithms()) == ["deepcache", "tome_sd", "torchao"]
    assert each["tome_sd_reduction_ratio"] == 0.25
"""
    )
    assert done.returncode == 0, done.stderr


def test_the_log_takes_any_record():
    """What Pruna says of the plug-in's own mark is left out; a record that cannot be formatted is no error."""

    def passes(text, *arguments):
        return bool(pruna_logger.filter(logging.LogRecord("pruna", logging.WARNING, "", 0, text, arguments, None)))

    assert passes("%d of %d", "a") and not passes(f"Setting {NEEDED} deprecated.")


def test_a_saved_model_in_fresh_processes(tmp_path):
    model = smash(make_pipeline("sd"), SmashConfig(["deepcache", "tome_sd"], device="cpu"))
    picture, removed = generate(model.model), merging_report(model.model).removed
    assert removed[1] > 0.3
    model.save_pretrained(tmp_path)
    load = f"model = PrunaModel.from_pretrained({str(tmp_path)!r})\n"
    done = run(load)
    assert done.returncode != 0
    assert "KeyError: 'import tomesd_plus.integrations.pruna before loading this model'" in done.stderr
    done = run(
        "import tomesd_plus.integrations.pruna\n" + load + "import sys; sys.path.insert(0, 'tests')\n"
        "from conftest import generate\n"
        "from tomesd_plus import merging_report\n"
        "print('sum', generate(model.model).double().sum().item(), merging_report(model).removed)"
    )
    assert done.returncode == 0, done.stderr
    assert f"sum {picture.double().sum().item()} {removed}" in done.stdout
    assert "before loading this model" not in done.stdout + done.stderr


def test_models_without_ours_load_without_the_plug_in(tmp_path):
    smash(make_pipeline("sd"), SmashConfig(["deepcache"], device="cpu")).save_pretrained(tmp_path)
    done = run(f"PrunaModel.from_pretrained({str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr
    assert pruna_tools.PrunaModel.from_pretrained(tmp_path).model
