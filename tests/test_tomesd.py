"""Bit for bit what tomesd 0.1.3 does, on a CPU."""

import itertools

import pytest
import tomesd
import torch
from conftest import generate, make_pipeline, make_unet
from tomesd.merge import bipartite_soft_matching_random2d

from tomesd_plus import tomesd as ours
from tomesd_plus.tomesd import bipartite_match, draw_destinations

SIZES = [(64, 64), (65, 65), (33, 47), (13, 9)]
RATIOS = [0.0, 0.1, 0.25, 0.5, 0.75, 0.95]
CELLS = [(2, 2), (4, 4), (2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_plans_are_equal(height, width, cell, batch, dtype):
    sy, sx = cell
    tokens = height * width
    torch.manual_seed(tokens + batch)
    metric = torch.randn(batch, tokens, 8).to(dtype)
    x = torch.randn(batch, tokens, 8).to(dtype)
    for ratio, random in itertools.product(RATIOS, (False, True)):
        r = int(tokens * ratio)
        merge, unmerge = bipartite_soft_matching_random2d(
            metric, width, height, sx, sy, r, no_rand=not random, generator=torch.Generator().manual_seed(5)
        )
        if r == 0:
            assert torch.equal(merge(x), x)  # theirs; ours makes no plan
            continue
        generator = torch.Generator().manual_seed(5) if random else None
        plan = bipartite_match(metric, draw_destinations(height, width, cell, generator, metric.device), r)
        merged = plan.merge(x)
        assert merged.shape[1] < tokens
        assert torch.equal(merged, merge(x))
        assert torch.equal(plan.unmerge(merged), unmerge(merge(x)))


FLAGS = [flags for flags in itertools.product((False, True), repeat=3)]


def _pair(dtype, **overrides):
    """Two equal UNets, the first with tomesd's patch."""
    return make_unet(**overrides).to(dtype), make_unet(**overrides).to(dtype)


@torch.no_grad()
def _forwards(unet, batch, dtype, size=(16, 16), forwards=3):
    generator = torch.Generator().manual_seed(2)
    outputs = []
    for index in range(forwards):
        sample = torch.randn(batch, 4, *size, generator=generator).to(dtype)
        text = torch.randn(batch, 7, 16, generator=generator).to(dtype)
        outputs.append(unet(sample, 900 - 100 * index, text).sample)
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "".join("acm"[i] if on else "-" for i, on in enumerate(f)))
@pytest.mark.parametrize("batch", [1, 2])
def test_whole_unets_are_equal_over_several_forwards(flags, batch, dtype):
    options = dict(zip(("merge_attn", "merge_crossattn", "merge_mlp"), flags), ratio=0.6, max_downsample=2)
    theirs, mine = _pair(dtype)
    plain = _forwards(mine, batch, dtype)
    results = []
    for module, unet in ((tomesd, theirs), (ours, mine)):
        torch.manual_seed(11)  # the random destinations start from the global generator
        assert module.apply_patch(unet, **options) is unet
        results.append(_forwards(unet, batch, dtype))
    for their, my, untouched in zip(*results, plain):
        assert torch.equal(their, my)
        assert torch.equal(my, untouched) == (not any(flags))  # it did merge


@pytest.mark.parametrize("size", [(16, 16), (13, 9), (18, 26)])
@pytest.mark.parametrize("options", [
    {}, {"ratio": 0.0}, {"ratio": 0.95}, {"sx": 4, "sy": 4, "ratio": 0.9}, {"sx": 3}, {"use_rand": False},
    {"max_downsample": 8},
], ids=str)  # fmt: skip
def test_options_and_sizes(options, size):
    theirs, mine = _pair(torch.float32)
    results = []
    for module, unet in ((tomesd, theirs), (ours, mine)):
        torch.manual_seed(11)
        module.apply_patch(unet, **options)
        results.append(_forwards(unet, 2, torch.float32, size))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [(True, False, False), (True, True, True)])
def test_single_blocks_are_equal(flags, dtype):
    """One transformer block's output, caught inside both UNets."""
    options = dict(zip(("merge_attn", "merge_crossattn", "merge_mlp"), flags))
    caught = []
    for module, unet in zip((tomesd, ours), _pair(dtype)):
        torch.manual_seed(11)
        module.apply_patch(unet, **options)
        block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
        block.register_forward_hook(lambda block, args, output: caught.append(output))
        _forwards(unet, 2, dtype, forwards=1)
    assert torch.equal(*caught)


@pytest.mark.parametrize("kind", ["sd", "controlnet"])
def test_pipelines_defaults_and_removal(kind):
    pipes = [make_pipeline(kind), make_pipeline(kind)]
    plain = generate(pipes[0])
    pictures = []
    for module, pipe in zip((tomesd, ours), pipes):
        torch.manual_seed(11)
        module.apply_patch(pipe)
        pictures.append(generate(pipe))
        module.apply_patch(pipe)  # again replaces the first
        module.remove_patch(pipe)
        assert torch.equal(generate(pipe), plain)
    assert torch.equal(*pictures) and not torch.equal(pictures[0], plain)


def test_signature_is_theirs():
    import inspect

    assert [(p.name, p.default) for p in inspect.signature(ours.apply_patch).parameters.values()] == [
        (p.name, p.default) for p in inspect.signature(tomesd.apply_patch).parameters.values()
    ]


def test_what_has_no_unet_is_refused_in_words():
    with pytest.raises(TypeError, match="expected a diffusers pipeline with a UNet"):
        ours.apply_patch(torch.nn.Linear(1, 1), ratio=0.5)
