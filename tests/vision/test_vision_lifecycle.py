"""Copies, files, threads, gradients, precision, compilation; and what is refused."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from tests.vision_tools import KINDS, LAYERS, forward, make_tower, pictures
from tomesd_plus import apply_token_merging, merging_report, remove_token_merging, token_merging

R = 8


def merged_tower(kind="vit", **options):
    model = make_tower(kind)
    return model, apply_token_merging(model, **({"r": R} | options))


@pytest.mark.parametrize(
    "kind, options",
    [
        ("dinov3", {}),
        *(pytest.param(kind, {}, marks=pytest.mark.slow) for kind in KINDS if kind != "dinov3"),
        pytest.param("vit", {"method": "evit"}, marks=pytest.mark.slow),
        pytest.param("vit", {"protect": [True, False] * 32}, marks=pytest.mark.slow),
        pytest.param("vit", {"r": None, "ratio": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_fixed_r(kind, options):
    model, report = merged_tower(kind, **options)
    expected = forward(copy.deepcopy(model))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(forward(compiled), expected, atol=1e-5, rtol=0)
    assert report.removed > 0.4 and len(report.layers) == LAYERS


@pytest.mark.slow
def test_hidden_states_of_a_compiled_tower():
    model, _ = merged_tower()
    with torch.no_grad():
        expected = model(pictures(), output_hidden_states=True).hidden_states  # transformers puts its hooks on
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        hidden = compiled(pictures(), output_hidden_states=True).hidden_states
    for ours, theirs in zip(hidden, expected, strict=True):
        assert ours.shape == (2, 65, 32)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_inductor_gives_the_same():
    model, _ = merged_tower()
    expected = forward(copy.deepcopy(model))
    torch.compiler.reset()
    torch.testing.assert_close(forward(torch.compile(model, fullgraph=True)), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_compiled_tower_may_be_merged_and_restored():
    model = make_tower()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    untouched = forward(compiled)
    report = apply_token_merging(compiled, r=R)
    assert not torch.equal(forward(compiled), untouched) and report.removed == 0.5
    remove_token_merging(compiled)
    assert torch.equal(forward(compiled), untouched)


@pytest.mark.slow
def test_layers_compiled_one_by_one():
    model, report = merged_tower()
    expected = forward(copy.deepcopy(model))
    torch.compiler.reset()
    for layer in model.layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(forward(model), expected, atol=1e-5, rtol=0)
    assert report.removed == 0.5


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_merge_and_come_off_by_themselves(kind, how):
    model, _ = merged_tower(kind, protect=[True] * 5 + [False] * 59)
    expected, untouched = forward(model), forward(make_tower(kind))
    copied = how(model)
    assert merging_report(copied).layers == []
    assert torch.equal(forward(copied), expected) and merging_report(copied).removed == 0.5
    remove_token_merging(copied)
    assert torch.equal(forward(copied), untouched) and torch.equal(forward(model), expected)


def test_saved_weights_are_those_of_the_tower_itself(tmp_path):
    model, _ = merged_tower()
    model.save_pretrained(tmp_path)
    assert "token_merging" not in (tmp_path / "config.json").read_text()
    loaded = transformers.ViTModel.from_pretrained(tmp_path).eval()
    assert torch.equal(forward(loaded), forward(make_tower()))
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(forward(torch.load(tmp_path / "model.pt", weights_only=False)), forward(model))


def test_threads_do_not_meet():
    model, _ = merged_tower()
    batches = [pictures(count) for count in (1, 2, 3)]
    expected = [forward(model, batch) for batch in batches]
    wrong = []

    def run(index):
        for _ in range(10):
            if not torch.equal(forward(model, batches[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "kind, method", [("vit", "merging"), ("vit", "evit"), ("siglip", "merging"), ("dinov3", "merging")]
)
def test_gradients_pass_with_and_without_checkpoints(kind, method):
    def gradients(model, before_backward=lambda: None):
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(pictures()).last_hidden_state.square().mean()
        before_backward()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model, report = merged_tower(kind, method=method)
    model.train()
    plain = gradients(model)
    assert report.merged and all(grad.isfinite().all() for grad in plain.values())
    assert plain["embeddings.patch_embeddings.projection.weight" if kind == "vit" else next(iter(plain))].any()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

        def another_call():  # what a second run for gradients needs is its own call's
            with torch.no_grad():
                model(pictures(1))

        again = gradients(model, another_call)
        assert again.keys() == plain.keys()
        for name, gradient in again.items():
            torch.testing.assert_close(gradient, plain[name], msg=name)


def test_a_tower_learns_with_merging_on():
    model, report = merged_tower()
    model.train()
    weights = [parameter.clone() for parameter in model.layers[0].parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(10):  # to tell two pictures apart
        one, other = model(pictures()).last_hidden_state.mean(1)
        loss = torch.cosine_similarity(one, other, dim=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05 and report.removed == 0.5
    assert not any(map(torch.equal, weights, model.layers[0].parameters()))


@pytest.mark.parametrize("method", ["merging", "evit", "ats"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method, dtype):
    model, report = merged_tower(method=method)
    exact = forward(model)
    output = forward(model.to(dtype), pictures().to(dtype))
    assert output.dtype == dtype and report.merged and output.isfinite().all()
    assert (output.float() - exact).abs().median() < 0.1 * exact.std()


def test_hooks_of_others_see_layers_at_full_length():
    model, report = merged_tower()
    expected, seen = forward(model), []
    handle = model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(forward(model), expected)
    handle.remove()
    assert [each.shape for each in seen] == [(2, 65, 32)] and report.removed == 0.5


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_merges():
    model, _ = merged_tower()

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = model

        def forward(self, pixel_values):
            return self.tower(pixel_values).last_hidden_state

    with torch.no_grad():
        traced = torch.jit.trace(Tower(), pictures(), check_trace=False)
        assert torch.equal(traced(pictures()), forward(model))


def test_an_export_merges_or_is_refused_in_words():
    model, _ = merged_tower("clip")
    exported = torch.export.export(model, (pictures(),)).module()
    torch.testing.assert_close(exported(pictures()).last_hidden_state, forward(model), atol=1e-5, rtol=0)
    model, _ = merged_tower("vit")
    with pytest.raises(RuntimeError, match=r"cannot be exported.*remove_token_merging first"):
        torch.export.export(model, (pictures(),))


def test_a_call_with_a_mask_is_left_alone_and_told_of_once():
    model, report = merged_tower()
    mask = torch.ones(2, 65, dtype=torch.long)
    mask[:, 60:] = 0
    with pytest.warns(UserWarning, match="does nothing in this call: the call has an attention mask"):
        masked = forward(model, attention_mask=mask)
    assert torch.equal(forward(model, attention_mask=mask), masked)  # no second warning
    assert torch.equal(masked, forward(make_tower(), attention_mask=mask))
    assert not report.merged and report.left_alone == {"the model": "the call has an attention mask"}
    assert "left alone: the call has an attention mask" in str(report)
    assert len(report.source_map(2)[0].unique()) == 64


def test_it_is_applied_once_and_comes_off_after_an_error():
    model, _ = merged_tower()
    with pytest.raises(ValueError, match="already applied to the model: call remove_token_merging first"):
        apply_token_merging(model)
    remove_token_merging(model)
    with pytest.raises(ValueError, match="not applied"):
        merging_report(model)
    with pytest.raises(KeyError), token_merging(model, r=R):
        raise KeyError
    assert torch.equal(forward(model), forward(make_tower()))


@pytest.mark.parametrize("version", ["4.56.2", "5.0.0", "5.14.0", "5.17.0.dev0"])
def test_transformers_that_are_too_old_are_refused_in_words(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"needs transformers 5\.18 or later, but {version} is installed"):
        apply_token_merging(make_tower())


@pytest.mark.parametrize("part", ["attention.config", "attention.k_proj", "layernorm_after", "mlp"])
def test_layers_made_otherwise_are_refused_in_words(part):
    model = make_tower()
    owner, _, name = f"layers.1.{part}".rpartition(".")
    delattr(model.get_submodule(owner), name)
    with pytest.raises(TypeError, match=rf"layers\.1 \(ViTLayer\) cannot be merged.* it has no {part}"):
        apply_token_merging(model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("implementation", list(CheckpointImpl))
@pytest.mark.parametrize("method", ["merging", "ats"])
def test_a_second_run_of_whole_layers_leaves_the_report_as_it_was(method, implementation):
    def gradients(model):
        model(pictures().requires_grad_()).last_hidden_state.square().mean().backward()
        return {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}

    model, report = merged_tower(method=method)
    plain = gradients(model)
    expected, groups = report.layers, [report.source_map(index) for index in range(LAYERS)]
    model, report = merged_tower(method=method)
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer, implementation)
    again = gradients(model)
    assert report.layers == expected and report.removed == 0.5
    assert all(torch.equal(report.source_map(index), groups[index]) for index in range(LAYERS))
    assert report.source_map().shape == (2, 8, 8)
    for name, gradient in again.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, plain[name], msg=name)


def test_an_exception_in_a_layer_leaves_nothing_behind():
    model, _ = merged_tower()
    expected, tokens = forward(model), torch.randn(2, 65, 32)
    mlp, norm = model.layers[0].mlp, model.layers[0].layernorm_after
    untouched = make_tower().layers[0]
    alone = ((mlp, tokens, untouched.mlp(tokens)), (norm, tokens[:1], untouched.layernorm_after(tokens[:1])))
    for module, call, result in alone:
        handle = mlp.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(model)
        handle.remove()
        assert torch.equal(module(call), result)
        assert torch.equal(forward(model), expected)


def test_a_grid_of_pictures_that_were_not_finished_is_forgotten():
    model, report = merged_tower("dinov2")
    model.embeddings.patch_embeddings(pictures(1, 24, 16))  # by itself
    model.encoder(torch.randn(2, 65, 32))
    assert report.source_map().shape == (2, 1, 64)
