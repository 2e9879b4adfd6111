"""Failures, Ctrl-C, switching on and off, and copies in the middle of a generation, even in the middle of a layer.

Afterwards everything is as on a fresh pipeline, bit for bit.
"""

import copy
import pickle
import warnings

import pytest
import torch
from conftest import generate, hooks, make_pipeline
from test_lifecycle import FEATURES, merging, traces

from tomesd_plus import apply_token_merging

CHOSEN = {name: FEATURES[name] for name in ("bare processor", "merging", "whole blocks", "cache", "preset", "drop-in")}


@pytest.fixture(params=CHOSEN, ids=lambda name: name.replace(" ", "-"))
def feature(request):
    return CHOSEN[request.param]


@pytest.fixture(scope="module")
def untouched():
    return generate(make_pipeline("sd"))


_expected = {}


def of_a_fresh_pipeline(feature):
    """The picture of a pipeline that has seen nothing but this feature."""
    if id(feature) not in _expected:
        fresh = make_pipeline("sd")
        feature.on(fresh)
        _expected[id(feature)] = generate(fresh)
    return _expected[id(feature)]


def quietly(function, *arguments):
    """Switch on or off in the middle of a run, where a word from us is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function(*arguments)


LAYERS = {  # of the UNet, by where they lie
    "first layer": lambda unet: unet.time_proj,
    "first attention": lambda unet: unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q,
    "its MLP": lambda unet: unet.down_blocks[0].attentions[0].transformer_blocks[0].ff,
    "mid block": lambda unet: unet.mid_block.resnets[0],
    "last attention": lambda unet: unet.up_blocks[-1].attentions[-1].transformer_blocks[0].attn1.to_out[0],
    "last layer": lambda unet: unet.conv_out,
}


def some_of(places, *fast):
    """Parameters of which only some are for the fast suite."""
    return [pytest.param(place, marks=[] if place in fast else pytest.mark.slow) for place in places]


class At:
    """Does something the n-th time that a layer runs."""

    def __init__(self, pipe, where, when, action):
        self.when, self.action, self.calls, self.done = when, action, 0, False
        self.handle = LAYERS[where](pipe.unet).register_forward_pre_hook(self)

    def __call__(self, layer, args):
        self.calls += 1
        if self.calls == self.when + 1:
            self.done = True
            self.action()

    def __reduce__(self):  # it lies on the model that is pickled, and does nothing in a copy
        return Nothing, ()

    def __deepcopy__(self, memo):
        return Nothing()


class Nothing:
    def __call__(self, layer, args):
        pass


def when_run(feature, where, when):
    """A layer's run of this number, or its first if cached steps may not run it."""
    return 0 if feature.caches and where not in ("first layer", "last layer", "between steps") else when


def fails_with(error):
    def action():
        raise error("in the middle")

    return action


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", some_of(LAYERS, "first attention"))
def test_the_very_first_generation_fails(feature, error, where, untouched):
    """Before any generation has ended, and again in the next; then it runs, goes, and comes back."""
    pipe = make_pipeline("sd")
    before = traces(pipe)
    feature.on(pipe)
    for seed, when in ((1, 0), (2, 1)):
        at = At(pipe, where, when_run(feature, where, when), fails_with(error))
        with pytest.raises(error, match="in the middle"):
            generate(pipe, seed)
        at.handle.remove()
    assert torch.equal(generate(pipe), of_a_fresh_pipeline(feature))
    feature.off(pipe)
    assert torch.equal(generate(pipe), untouched) and traces(pipe) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["first attention", "last layer"])
def test_switched_off_right_after_a_failure(feature, error, where, untouched):
    """Nothing is called between the failure and the removal, so nothing else can clean up."""
    pipe = make_pipeline("sd")
    before = traces(pipe)
    feature.on(pipe)
    at = At(pipe, where, when_run(feature, where, 1), fails_with(error))
    with pytest.raises(error):
        generate(pipe)
    at.handle.remove()
    feature.off(pipe)
    assert torch.equal(generate(pipe), untouched) and traces(pipe) == before
    feature.on(pipe)
    assert torch.equal(generate(pipe), of_a_fresh_pipeline(feature))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_layers_run_by_themselves_after_a_failure(feature, error):
    """A layer that is called alone is an ordinary one again."""
    pipe = make_pipeline("sd")
    block, tokens = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0], torch.randn(2, 256, 16)
    text = torch.randn(2, 7, 16)
    expected = block(tokens, encoder_hidden_states=text)
    feature.on(pipe)
    for when in (0, 1):
        at = At(pipe, "last layer", when, fails_with(error))
        with pytest.raises(error):
            generate(pipe)
        at.handle.remove()
        generate(pipe)
        assert torch.equal(block(tokens, encoder_hidden_states=text), expected)
    feature.off(pipe)


@pytest.mark.parametrize("where", ["scheduler", "decoder"])
def test_a_failure_outside_of_the_unet(feature, where):
    pipe = make_pipeline("sd")
    feature.on(pipe)
    owner, name = (pipe.scheduler, "step") if where == "scheduler" else (pipe.vae, "decode")
    method, calls = getattr(owner, name), []

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) == (2 if where == "scheduler" else 1):
            raise KeyboardInterrupt("in the middle")
        return method(*arguments, **options)

    setattr(owner, name, fail)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, seed=3)
    setattr(owner, name, method)
    assert torch.equal(generate(pipe), of_a_fresh_pipeline(feature))


@pytest.mark.parametrize("where", some_of(["between steps", *LAYERS], "between steps", "last attention"))
@pytest.mark.parametrize("when", [0, 2])
def test_switched_on_in_the_middle(feature, where, when, untouched):
    """From a callback, or even from inside of a layer: that picture is a picture, the next is a fresh pipeline's."""
    pipe = make_pipeline("sd")
    switch = lambda: quietly(feature.on, pipe)  # noqa: E731
    picture = run_with(pipe, where, when, switch)
    assert picture.isfinite().all() and picture.shape == untouched.shape
    assert torch.equal(generate(pipe), of_a_fresh_pipeline(feature))
    feature.off(pipe)
    assert torch.equal(generate(pipe), untouched)


@pytest.mark.parametrize("where", some_of(["between steps", *LAYERS], "between steps"))
@pytest.mark.parametrize("when", [0, 2])
def test_switched_off_in_the_middle(feature, where, when, untouched):
    if feature is CHOSEN["whole blocks"] and where in ("first attention", "its MLP", "last attention"):
        pytest.skip("refused: see below")
    pipe = make_pipeline("sd")
    before = traces(pipe)
    feature.on(pipe)
    picture = run_with(pipe, where, when_run(feature, where, when), lambda: quietly(feature.off, pipe))
    assert picture.isfinite().all() and picture.shape == untouched.shape
    assert torch.equal(generate(pipe), untouched) and traces(pipe) == before
    feature.on(pipe)
    assert torch.equal(generate(pipe), of_a_fresh_pipeline(feature))


REFUSED = {
    "whole blocks": (CHOSEN["whole blocks"], "its MLP"),
    "an MLP": (merging(ratio=0.5, layers=["self_attention", "mlp"]), "its MLP"),
    "cached layers": (CHOSEN["cache"], "a skipped layer"),
    "a preset's cached layers": (CHOSEN["preset"], "a skipped layer"),
}


@pytest.mark.parametrize(("feature", "where"), REFUSED.values(), ids=REFUSED)
def test_switching_off_is_refused_where_the_layers_to_come_could_not_go_on(feature, where, untouched):
    """In a layer whose tokens are merged, and where a cached step has skipped a part of what would run then."""
    pipe = make_pipeline("sd")
    before = traces(pipe)
    feature.on(pipe)
    layer = LAYERS[where](pipe.unet).net[0] if where == "its MLP" else pipe.unet.down_blocks[1]
    runs = []

    def off_at_the_second_step(*arguments):
        runs.append(1)
        if len(runs) == 2:
            feature.off(pipe)

    handle = layer.register_forward_hook(off_at_the_second_step)
    with pytest.raises(RuntimeError, match="cannot be removed from inside of"):
        generate(pipe)
    handle.remove()
    assert torch.equal(generate(pipe), of_a_fresh_pipeline(feature))
    feature.off(pipe)
    assert torch.equal(generate(pipe), untouched) and traces(pipe) == before


@pytest.mark.parametrize("where", ["layer", "hook", "scheduler"])
@pytest.mark.parametrize("cache", ["cache", "attention cache", "adaptive cache", "plan"])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_layers_called_by_themselves_right_after_ctrl_c(cache, where, when):
    """PyTorch tells no hook of a ``KeyboardInterrupt``; a layer or block called next is an ordinary one."""
    pipe, feature = make_pipeline("sd"), FEATURES[cache]
    block, text = pipe.unet.down_blocks[1], torch.randn(2, 7, 16)
    states, embedding = torch.randn(2, 16, 8, 8), torch.randn(2, 64)

    def alone():
        with torch.no_grad():
            attention = block.attentions[0].transformer_blocks[0].attn1
            return [block(states, embedding, encoder_hidden_states=text)[0], attention(torch.ones(2, 16, 32))]

    expected = alone()
    feature.on(pipe)
    calls, fail = [], fails_with(KeyboardInterrupt)

    def later(*arguments, **options):
        calls.append(1)
        if len(calls) == when + 1:
            fail()
        return step(*arguments, **options) if where == "scheduler" else None

    step, handle = pipe.scheduler.step, None
    if where == "scheduler":
        pipe.scheduler.step = later
    elif where == "layer":
        handle = pipe.unet.conv_out.register_forward_pre_hook(later)
    else:
        handle = pipe.unet.up_blocks[1].resnets[-1].register_forward_hook(later)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, seed=3)
    assert all(map(torch.equal, alone(), expected))
    pipe.scheduler.step = step
    if handle is not None:
        handle.remove()
    assert torch.equal(generate(pipe), of_a_fresh_pipeline(feature))


def run_with(pipe, where, when, action):
    """A generation with an action in the middle."""
    if where == "between steps":

        def callback(pipe, step, timestep, tensors):
            if step == when:
                action()
            return tensors

        return generate(pipe, callback_on_step_end=callback)
    at = At(pipe, where, when, action)
    picture = generate(pipe)
    at.handle.remove()
    assert at.done
    return picture


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("where", ["first attention", "last layer"])
def test_copied_in_the_middle_of_a_layer(feature, how, where, untouched):
    """Neither the original nor the copy is disturbed."""
    pipe = make_pipeline("sd")
    feature.on(pipe)
    copies = []

    def make_copy():
        unet = copy.deepcopy(pipe.unet) if how == "deepcopy" else pickle.loads(pickle.dumps(pipe.unet))
        copies.append(unet)

    assert torch.equal(run_with(pipe, where, when_run(feature, where, 1), make_copy), of_a_fresh_pipeline(feature))
    other = copy.copy(pipe)
    other.unet = copies[0]
    assert torch.equal(generate(other), of_a_fresh_pipeline(feature))
    feature.off(other)
    assert torch.equal(generate(other), untouched)
    assert torch.equal(generate(pipe), of_a_fresh_pipeline(feature))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_copied_after_a_failure(feature, error, untouched):
    pipe = make_pipeline("sd")
    feature.on(pipe)
    at = At(pipe, "last layer", 1, fails_with(error))
    with pytest.raises(error):
        generate(pipe)
    at.handle.remove()
    other = copy.copy(pipe)
    other.unet = pickle.loads(pickle.dumps(pipe.unet))
    assert torch.equal(generate(other), of_a_fresh_pipeline(feature))
    feature.off(other)
    assert torch.equal(generate(other), untouched)


def test_switched_off_twice_in_the_middle(feature, untouched):
    pipe = make_pipeline("sd")
    feature.on(pipe)

    def off_twice():
        feature.off(pipe)
        quietly(feature.off, pipe)

    run_with(pipe, "between steps", 1, off_twice)
    assert torch.equal(generate(pipe), untouched) and not hooks(pipe)


def test_one_in_place_of_another_in_the_middle(pipe, untouched):
    """Removed and applied with other options between two steps: the next picture is that of the other options."""
    fresh = make_pipeline("sd")
    apply_token_merging(fresh, ratio=0.25, full_steps=2)
    expected = generate(fresh)
    CHOSEN["merging"].on(pipe)

    def replace():
        CHOSEN["merging"].off(pipe)
        apply_token_merging(pipe, ratio=0.25, full_steps=2)

    run_with(pipe, "between steps", 1, replace)
    assert torch.equal(generate(pipe), expected)
