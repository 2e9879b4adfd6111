"""``with generation(pipe):``: what it begins, what it leaves, and what it says."""

import threading

import pytest
import torch
from conftest import INPUTS, generate, make_pipeline

from tomesd_plus import (
    ToMeProcessor,
    apply_feature_cache,
    apply_token_merging,
    generation,
    merging_report,
    remove_feature_cache,
    remove_token_merging,
)

TEXT = INPUTS["encoder_hidden_states"]


def test_after_it_generations_begin_by_themselves_again(pipe):
    report = apply_feature_cache(pipe, interval=3)
    merged = apply_token_merging(pipe, ratio=0.5, full_steps=3)
    expected = [generate(pipe, seed) for seed in range(3)]
    with generation(pipe):
        assert torch.equal(generate(pipe, 0), expected[0])
    for seed in (1, 2):
        assert torch.equal(generate(pipe, seed), expected[seed])
        assert len(report.steps) == len(merged.steps) == 4


@torch.no_grad()
def test_a_processor_set_by_itself_is_part_of_it_before_its_first_call(pipe):
    pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5, full_steps=3))
    with generation(pipe):
        for timestep in (100, 300, 500):  # each rise would begin another generation
            pipe.unet(INPUTS["sample"], timestep, TEXT)
    assert [bool(step.removed) for step in merging_report(pipe).steps] == [False, True, True]


def test_it_says_so_where_nothing_is_on(pipe):
    with pytest.warns(UserWarning, match="nothing is switched on"), generation(pipe):
        pass


def test_what_is_removed_inside_stays_removed(pipe):
    plain = generate(pipe)
    apply_feature_cache(pipe, interval=2)
    apply_token_merging(pipe, ratio=0.5, full_steps=2)
    with generation(pipe) as scope:
        generate(pipe)
        remove_feature_cache(pipe)
        remove_token_merging(pipe)
        assert torch.equal(generate(pipe), plain)
    assert torch.equal(generate(pipe), plain)
    with pytest.warns(UserWarning, match="nothing is switched on"), scope:
        assert torch.equal(generate(pipe), plain)


@torch.no_grad()
def test_steps_of_one_generation_in_several_threads(pipe):
    """As when a pool consumes a generator of steps: a scope around each goes from thread to thread."""
    apply_feature_cache(pipe, interval=3, forecast=1.0)
    apply_token_merging(pipe, ratio=0.5, full_steps=3)
    timesteps = (901, 801, 701, 601, 501, 401)
    expected = [pipe.unet(INPUTS["sample"], t, TEXT).sample for t in timesteps]
    scope, made = generation(pipe), []

    def step(timestep):
        with scope, torch.no_grad():
            made.append(pipe.unet(INPUTS["sample"], timestep, TEXT).sample)

    for timestep in timesteps:
        thread = threading.Thread(target=step, args=(timestep,))
        thread.start()
        thread.join()
    assert all(map(torch.equal, made, expected))


def test_controlnets_are_part_of_it():
    pipe = make_pipeline("controlnet")
    report = apply_token_merging(pipe, ratio=0.5, full_steps=2)
    expected = generate(pipe)
    with generation(pipe):
        assert torch.equal(generate(pipe), expected)
    assert any(layer.name.startswith("controlnet") for layer in report.layers)
