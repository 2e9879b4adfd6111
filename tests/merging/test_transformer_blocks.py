"""MLPs by the attention's plan, whole blocks, and runs of blocks that are merged once and unmerged once."""

import copy

import pytest
import torch
from transformer_tools import FAMILIES, call, generate, make_pipeline, make_transformer

from tomesd_plus import apply_token_merging, remove_token_merging, token_merging
from tomesd_plus.host.transformers import blocks_of

BLOCK = {"ratio": 0.5, "layers": "block"}


def image_of(output):
    return output[1] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"layers": ["self_attention", "mlp"]},
        {"layers": ["self_attention", "mlp"], "full_steps": 2},
        {"layers": ["self_attention", "mlp"], "sides": "keys_values"},
        {"layers": ["self_attention", "mlp"], "metric": "block_input"},
        {"layers": ["self_attention", "mlp"], "gate": "remeasure"},
        {"layers": "block"},
        {"layers": "block", "full_steps": 2},
        {"layers": "block", "blocks_per_run": 2},
        {"layers": "block", "blocks_per_run": 3, "full_steps": 2},
        {"layers": "block", "blocks_per_run": "all", "plan_every": 2},
        {"layers": "block", "blocks_per_run": "all", "mode": "prune", "proportional_attention": False},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_pictures_repeat_and_removal_is_bit_identical(family, options, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pipe = make_pipeline(family)
    untouched = generate(pipe)
    with token_merging(pipe, ratio=0.0, **options):
        assert torch.equal(generate(pipe), untouched)
    report = apply_token_merging(pipe, ratio=0.5, **options)
    merged = generate(pipe)
    gated = options.get("gate") is not None  # what pays in so small a model is for the machine to say
    assert gated or (report.merged and not torch.equal(merged, untouched))
    assert torch.equal(generate(pipe), merged)
    other = generate(pipe, height=48, width=32, prompt=["a cat", "a dog"])
    assert torch.equal(generate(pipe), merged)
    assert torch.equal(generate(pipe, height=48, width=32, prompt=["a cat", "a dog"]), other)
    remove_token_merging(pipe)
    assert torch.equal(generate(pipe), untouched)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, "all"])
def test_a_run_is_merged_once_and_exact_in_its_residual(family, size):
    """Every token gets its own residual and what the run has changed in its group: run the blocks by hand."""
    model = make_transformer(family)
    alone = copy.deepcopy(model)
    shapes, seen = [], []
    for block in blocks_of(model).values():
        block.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs.get("hidden_states", args[0] if args else None)),
            with_kwargs=True,
        )
    report = apply_token_merging(model, **BLOCK, blocks_per_run=size)
    for block in blocks_of(model).values():
        block.register_forward_pre_hook(
            lambda m, args, kwargs: shapes.append(kwargs.get("hidden_states", args[0] if args else None).shape[1]),
            with_kwargs=True,
        )
    output = call(model, 6, 8)
    blocks = len(shapes)
    assert report.merged and shapes == [24] * blocks
    length = blocks if size == "all" else size
    assert len(report.layers) == -(-blocks // length)
    plain = call(alone, 6, 8)
    assert (output - plain).abs().max() > 0
    assert [each.shape[1] for each in seen[::length]] == [48] * len(report.layers)


@pytest.mark.parametrize("family", ["sd3", "flux", "pixart-alpha"])
def test_what_a_run_adds_is_what_its_blocks_add_to_merged_tokens(family):
    model = make_transformer(family)
    blocks = list(blocks_of(model).values())
    entered, left, merged_in, merged_out = [], [], [], []
    first, last = blocks[0], blocks[-1]

    def remember(into, kwargs, args):
        into.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    first.register_forward_pre_hook(lambda m, args, kwargs: remember(entered, kwargs, args), with_kwargs=True)
    apply_token_merging(model, **BLOCK, blocks_per_run="all")
    first.register_forward_pre_hook(lambda m, args, kwargs: remember(merged_in, kwargs, args), with_kwargs=True)
    last.register_forward_hook(lambda m, args, output: merged_out.append(image_of(output)), prepend=True)
    last.register_forward_hook(lambda m, args, output: left.append(image_of(output)))
    call(model, 6, 8)
    attachment = (first.attn1 if family.startswith("pixart") else first.attn).processor.attachment
    [plan] = attachment.decider.current.call.plans.values()
    torch.testing.assert_close(merged_in[0], plan.merge(entered[0]))
    torch.testing.assert_close(left[0], entered[0] + plan.unmerge(merged_out[0] - merged_in[0]))


def test_flux_single_blocks_run_attention_and_mlp_on_the_same_merged_tokens():
    model = make_transformer("flux")
    lengths = []
    for block in model.single_transformer_blocks:
        block.proj_mlp.register_forward_hook(lambda m, args, output: lengths.append(output.shape[1]))
    report = apply_token_merging(model, ratio=0.5, layers=["self_attention", "mlp"])
    call(model, 8, 8)
    assert lengths == [32 + 7] * 2
    assert {layer.name for layer in report.layers} >= {"single_transformer_blocks.0", "transformer_blocks.0.ff"}
    remove_token_merging(model)
    report = apply_token_merging(model, ratio=0.5, layers=["mlp", "self_attention"], sides="queries")
    lengths.clear()
    call(model, 8, 8)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert lengths == [64 + 7] * 2
    assert "only both by one plan" in reasons["single_transformer_blocks.0.proj_mlp"]


def test_runs_are_left_alone_where_something_stands_between_blocks():
    model = make_transformer("sd3")
    added = [torch.randn(1, 64, 32)]
    plain, skipping = call(model, 8, 8, block_controlnet_hidden_states=added), call(model, 8, 8, skip_layers=[1])
    report = apply_token_merging(model, **BLOCK, blocks_per_run=3)
    with pytest.warns(UserWarning, match="a ControlNet adds to all tokens between the blocks"):
        assert torch.equal(call(model, 8, 8, block_controlnet_hidden_states=added), plain)
        assert not report.merged
    assert torch.equal(call(model, 8, 8, skip_layers=[1]), skipping)
    assert "blocks are skipped" in report.layers[0].reason
    call(model, 8, 8)
    assert report.merged


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["self_attention", ["self_attention", "mlp"], "block"])
def test_gradients_through_checkpointed_blocks_are_those_without_checkpointing(family, layers):
    gradients = []
    for checkpointing in (False, True):
        model = make_transformer(family)
        if checkpointing:
            model.enable_gradient_checkpointing()
            model.train()
        report = apply_token_merging(model, ratio=0.5, layers=layers)
        call(model, 8, 8, gradients=True).square().sum().backward()
        assert report.merged
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_runs_are_left_alone_while_blocks_are_checkpointed():
    model = make_transformer("sd3")
    model.enable_gradient_checkpointing()
    model.train()
    report = apply_token_merging(model, **BLOCK, blocks_per_run=3)
    with pytest.warns(UserWarning, match="run again for gradients"):
        call(model, 8, 8, gradients=True)
        assert not report.merged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks_per_run": 2}, "needs layers='block'"),
        ({"blocks_per_run": 0, "layers": "block"}, "at least 1, not 0"),
        ({"blocks_per_run": True, "layers": "block"}, "not True"),
        ({"blocks_per_run": "each", "layers": "block"}, "not 'each'"),
        ({"blocks_per_run": 2, "layers": "block", "gate": "on"}, "goes without a gate"),
    ],
)
def test_runs_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        apply_token_merging(make_transformer("sd3"), ratio=0.5, **options)


def test_runs_are_of_transformers():
    from conftest import make_unet

    with pytest.raises(ValueError, match="blocks_per_run is of transformers"):
        apply_token_merging(make_unet(), **BLOCK, blocks_per_run=2)
