"""Each cell of the table of combinations in docs/pruna.md."""

import copy
from pathlib import Path

import pruna_tools  # noqa: F401
import pytest
import torch
from conftest import generate, make_pipeline
from pruna import AlgorithmRegistry
from pruna.algorithms.base.tags import AlgorithmTag
from pruna_tools import make_vit, outputs, saved_and_loaded, smashed
from torch._dynamo.utils import counters

from tomesd_plus import apply_token_merging, merging_report
from tomesd_plus.schedules.named import schedule_by_name

OURS = ("tome_sd", "tome_cache", "tome_vision")
GROUPS = {AlgorithmTag.CACHER, AlgorithmTag.COMPILER, AlgorithmTag.QUANTIZER, AlgorithmTag.FACTORIZER}
WHY = {  # what Pruna says of the other algorithm by itself
    "other models": (ValueError, "Model is not compatible with"),
    "CUDA only": (ValueError, "not compatible with model device cpu"),
    "not installed": (ImportError, None),
}


def cells():
    """``(other, ours) -> what the page says``."""
    page = (Path(__file__).parents[2] / "docs" / "pruna.md").read_text()
    rows = [[cell.strip(" `") for cell in line.strip("|\n").split("|")] for line in page.splitlines()]
    start = next(index for index, row in enumerate(rows) if tuple(row[2:]) == OURS)
    found = {}
    for name, _, *said in rows[start + 2 :]:
        found |= {(name, ours): each for ours, each in zip(OURS, said, strict=True)}
        if name == "tome_vision":
            return found
    raise AssertionError("the table does not end with our own")


CELLS = cells()


def make(ours):
    return make_vit() if ours == "tome_vision" else make_pipeline("sd")


@pytest.fixture
def no_code_generation(monkeypatch):
    """Graphs are run as they are: which graphs there are is tested here, not what C++ is made of them."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_the_table_has_all_groups_and_says_what_is_declared():
    expected = {
        each.algorithm_name for each in AlgorithmRegistry.get_all_algorithms() if GROUPS & set(each.group_tags)
    }
    assert expected | set(OURS) <= {name for name, _ in CELLS}
    declared = {(name, ours) for ours in OURS for name in AlgorithmRegistry[ours].get_compatible_algorithms()}
    assert {cell for cell, said in CELLS.items() if said == "yes"} == declared


@pytest.mark.parametrize("other, ours", [cell for cell, said in CELLS.items() if said == "yes"])
def test_they_go_together(other, ours, tmp_path, no_code_generation):
    alone = outputs(smashed(make(ours), [other]))
    together = smashed(make(ours), [other, ours])
    first = outputs(together)
    assert not torch.equal(first, alone)
    assert torch.equal(first, outputs(together))
    assert torch.equal(first, outputs(saved_and_loaded(make(ours), [other, ours], tmp_path)))
    if ours == "tome_sd" and other != "torch_compile":  # compiled layers leave no notes
        assert merging_report(together).removed[1] > 0.3


@pytest.mark.parametrize("other, ours", [cell for cell, said in CELLS.items() if said in WHY])
def test_pruna_itself_refuses_the_model(other, ours):
    kind, said = WHY[CELLS[other, ours]]
    with pytest.raises(kind, match=said):
        smashed(make(ours), [other])
    with pytest.raises((ValueError, ImportError)):
        smashed(make(ours), [other, ours])


@pytest.mark.parametrize("other, ours", [cell for cell, said in CELLS.items() if said not in {"yes", "itself", *WHY}])
def test_they_are_refused_together(other, ours):
    assert CELLS[other, ours] in ("two caches", "another kind of model")
    with pytest.raises((ValueError, ImportError), match=r"incompatible|not import"):
        smashed(make(ours), [other, ours])


@pytest.mark.parametrize(
    "names",
    [
        ["qkv_diffusers", "torchao", "tome_sd", "tome_cache"],
        ["torchao", "tome_sd", "tome_cache", "torch_compile"],
        ["deepcache", "tome_sd", "torch_compile"],
    ],
)
def test_all_at_once(names, tmp_path, no_code_generation):
    together = smashed(make_pipeline("sd"), names)
    first = generate(together)
    assert torch.equal(first, generate(together))
    assert torch.equal(first, generate(saved_and_loaded(make_pipeline("sd"), names, tmp_path)))
    without = smashed(make_pipeline("sd"), [name for name in names if name != "tome_sd"])
    assert not torch.equal(first, generate(without))
    if "torch_compile" not in names:
        assert merging_report(together).removed[1] > 0.3


def test_pruna_refuses_deepcache_beside_torchao():
    with pytest.raises(ValueError, match="incompatible"):
        smashed(make_pipeline("sd"), ["deepcache", "torchao"])


def test_compiled_merging_makes_a_graph_for_each_plateau(no_code_generation):
    """A smooth schedule would compile again at each step; asked for, it does."""
    pipe = smashed(make_pipeline("sd"), ["tome_sd", "torch_compile"])
    eager = make_pipeline("sd")
    apply_token_merging(
        eager, schedule_by_name("steps", 0.5), plan_per="block"
    )  # compiled layers make their own plans
    picture = generate(pipe, num_inference_steps=6)
    plateaus = counters["stats"]["unique_graphs"]
    assert plateaus == 3 and not counters["graph_break"]
    assert torch.allclose(picture, generate(eager, num_inference_steps=6), atol=1e-4)
    torch._dynamo.reset()
    counters.clear()
    generate(
        smashed(make_pipeline("sd"), {"tome_sd": {"schedule": "cosine"}, "torch_compile": True}), num_inference_steps=6
    )
    assert counters["stats"]["unique_graphs"] > plateaus


def test_a_compiled_cache_has_two_graphs(no_code_generation):
    pipe = smashed(make_pipeline("sd"), ["tome_cache", "torch_compile"])
    picture = generate(copy.copy(pipe), num_inference_steps=6)
    assert counters["stats"]["unique_graphs"] == 2
    eager = smashed(make_pipeline("sd"), ["tome_cache"])
    assert torch.allclose(picture, generate(eager, num_inference_steps=6), atol=1e-4)


@pytest.mark.parametrize(
    "hyperparameters, graphs",
    [
        ({"tome_cache": {"preset": "quality"}}, 2),
        ({"tome_cache": {"preset": "balanced"}}, 4),
        ({"tome_cache": {"preset": "fast", "force": True}}, 3),
        ({"tome_cache": {}, "tome_sd": {}}, 6),
    ],
)
def test_graphs_of_presets_and_of_merging_with_a_cache(hyperparameters, graphs, no_code_generation):
    generate(smashed(make_pipeline("sd"), hyperparameters | {"torch_compile": True}), num_inference_steps=9)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@pytest.mark.parametrize("preset", ["quality", "balanced"])
def test_a_preset_that_merges_nothing_goes_with_tome_sd(preset):
    pipe = smashed(make_pipeline("sd"), {"tome_cache": {"preset": preset}, "tome_sd": {}})
    generate(pipe, num_inference_steps=9)
    assert merging_report(pipe).removed[1] > 0.1
