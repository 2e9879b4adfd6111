"""Compiled models: the same values, as few graphs as the schedule has plateaus, none from step to step."""

import gc
from itertools import pairwise

import pytest
import torch
from conftest import INPUTS, make_unet
from torch._dynamo.testing import CompileCounter

from tomesd_plus import CosineSchedule, ToMeProcessor, apply_token_merging, remove_token_merging
from tomesd_plus.merging.config import LAYERS

TIMESTEPS = torch.tensor([950, 800, 650, 500, 350, 200, 50])
PLATEAUS = CosineSchedule(0.7, 0.3).quantized(3)


@pytest.fixture(autouse=True)
def fresh():
    gc.collect()  # a waiting processor that goes takes its hook on all modules away, for which graphs are made anew
    torch.nn.Identity()(torch.zeros(1))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A backend that counts the graphs it is given and runs them as they are."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@torch.no_grad()
def graphs_per_step(unet, compiled, graphs, eager):
    """The graphs made up to each step; every output must be the eager model's."""
    counts = []
    for timestep in TIMESTEPS:
        torch.testing.assert_close(
            compiled(**INPUTS, timestep=timestep).sample, eager(**INPUTS, timestep=timestep).sample
        )
        counts.append(graphs.count)
    return counts


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("options", "later"),
    [
        ({"ratio": 0.5}, [0] * 6),
        ({"ratio": PLATEAUS}, [0, 1, 0, 0, 1, 0]),
        ({"ratio": 0.5, "layers": LAYERS, "window": 4}, [0] * 6),
        ({"ratio": 0.5, "layers": "block"}, [0] * 6),
        ({"ratio": 0.5, "sides": "keys_values", "metric": "keys", "destinations": "fixed"}, [0] * 6),
        ({"ratio": 0.5, "plan_per": "level"}, [0] * 6),
        ({"ratio": 0.5, "plan_per": "level", "plan_every": 2}, [0] * 6),  # the later blocks have taken a plan before
    ],
)
def test_graphs_are_made_once_a_plateau(options, later, whole):
    unet, eager, graphs = make_unet(), make_unet(), Graphs()
    plain = unet(**INPUTS, timestep=500).sample
    for model in (unet, eager):
        apply_token_merging(model, **{"plan_per": "block"} | options)  # compiled layers share for a whole level or not
    if whole:
        compiled = torch.compile(unet, backend=graphs)
    else:
        unet.compile_repeated_blocks(fullgraph=True, backend=graphs)
        compiled = unet
    counts = graphs_per_step(unet, compiled, graphs, eager)
    made = [b - a for a, b in pairwise(counts)]
    blocks = sum(name.endswith("attn1") for name, _ in unet.named_modules())
    assert max(made) <= counts[0] and (whole or counts[0] <= blocks)  # a plateau at most as many as the first
    if whole and "plan_every" in options:
        later = [1, *later[1:]]  # the first step that takes its plans from another
    if whole:  # one graph more or less where the hooks part the model: none from step to step is what counts
        made = [min(m, 1) for m in made]
    assert made == later
    remove_token_merging(unet)
    torch.testing.assert_close(compiled(**INPUTS, timestep=500).sample, plain)
    assert not torch.equal(eager(**INPUTS, timestep=500).sample, plain)


def test_the_processor_by_itself_makes_its_graphs_in_two_steps():
    """Set the short way it finds its model in the first call, by a hook that later calls do not have."""
    unet, eager, graphs = make_unet(), make_unet(), Graphs()
    for model in (unet, eager):
        model.set_attn_processor(ToMeProcessor(ratio=0.5, plan_per="block"))
    unet.compile_repeated_blocks(fullgraph=True, backend=graphs)
    counts = graphs_per_step(unet, unet, graphs, eager)
    assert len(set(counts[1:])) == 1
    plain = make_unet()(**INPUTS, timestep=500).sample
    assert (unet(**INPUTS, timestep=500).sample - plain).abs().max() > 1e-4


@pytest.mark.slow
def test_generated_kernels_compute_the_same():
    unet, eager = make_unet(), make_unet()
    for model in (unet, eager):
        apply_token_merging(model, ratio=0.5, plan_per="block", layers=["self_attention", "mlp"])
    unet.compile_repeated_blocks(fullgraph=True)
    with torch.no_grad():
        for timestep in TIMESTEPS[:2]:
            own, expected = (model(**INPUTS, timestep=timestep).sample for model in (unet, eager))
            torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_many_blocks_share_their_graphs():
    """As in SDXL: more blocks than graphs that may be made, and three plateaus."""
    deep = {"layers_per_block": 4}
    unet, eager, graphs = make_unet(**deep), make_unet(**deep), Graphs()
    for model in (unet, eager):
        apply_token_merging(model, ratio=PLATEAUS, max_downsample=2, plan_per="block")
    unet.compile_repeated_blocks(fullgraph=True, backend=graphs)
    counts = graphs_per_step(unet, unet, graphs, eager)
    kinds = 2  # blocks of level 1 and of level 2; those of the middle have the width of level 2
    assert counts[0] <= kinds + 1 and [b - a for a, b in pairwise(counts)] == [0, kinds, 0, 0, kinds, 0]


def test_a_compiled_preset_makes_as_many_graphs_however_many_layers_there_are():
    counts = []
    for layers in (1, 3):
        torch.compiler.reset()
        unet = make_unet(layers_per_block=layers)
        apply_token_merging(unet, ratio=0.5, full_steps=3, layers=LAYERS)
        unet.compile_repeated_blocks(fullgraph=True, backend=(counter := CompileCounter()))
        with torch.no_grad():
            for timestep in torch.tensor([900, 895, 890, 885, 880, 875]):
                unet(**INPUTS, timestep=timestep)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
