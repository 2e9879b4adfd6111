"""Compiled transformers: the same values, without breaks in the blocks' graphs, and no new ones from step to step."""

import copy
from typing import Any

import pytest
import torch
from transformer_tools import call, make_transformer

from tomesd_plus import CosineSchedule, apply_token_merging
from tomesd_plus.host.transformers import blocks_of

OPTIONS: list[dict[str, Any]] = [
    {},
    {"layers": ["self_attention", "mlp"], "plan_per": "level"},
    {"layers": "block"},
    {"layers": "block", "blocks_per_run": "all"},
    {"sides": "keys_values", "metric": "keys", "destinations": "fixed"},
]
QUICK = [("pixart-alpha", 1), ("sd35", 0), ("flux", 3)]
SLOW = [(f, o) for f in ("pixart-alpha", "sd35", "flux") for o in range(len(OPTIONS)) if (f, o) not in QUICK]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("family", "option"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_blocks_compile_in_one_graph_and_keep_it(family, option):
    options, graphs = OPTIONS[option], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, eager = make_transformer(family), make_transformer(family)
    plain = call(eager, 8, 6)
    for each in (model, eager):
        apply_token_merging(each, ratio=0.5, **{"plan_per": "block"} | options)
    for block in blocks_of(model).values():
        block.compile(fullgraph=True, backend=backend)
    counts = []
    for timestep in (900.0, 600.0, 300.0):
        expected = call(eager, 8, 6, timestep=timestep)
        torch.testing.assert_close(call(model, 8, 6, timestep=timestep), expected)
        counts.append(len(graphs))
    assert not torch.equal(expected, plain) and counts[0] > 0
    assert counts[1] == counts[2]  # a plan that was there before may cost a graph once


@pytest.mark.slow
@pytest.mark.parametrize("family", ["pixart-alpha", "sd35", "flux"])
def test_whole_models_compile_to_the_same_values(family):
    eager = make_transformer(family)
    apply_token_merging(eager, CosineSchedule(0.7, 0.3).quantized(2), plan_per="block")
    compiled = torch.compile(copy.deepcopy(eager), backend="eager")
    for timestep in (900.0, 100.0):
        torch.testing.assert_close(call(compiled, 8, 6, timestep=timestep), call(eager, 8, 6, timestep=timestep))
