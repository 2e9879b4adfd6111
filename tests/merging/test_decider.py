"""The decider: full steps, what it keeps of them for the detail-keeping unmerge, and for which calls."""

import copy

import pytest
import torch
from cache_tools import TEXT, noise
from conftest import INPUTS, OneLayer, attention_layer, begin_call, make_unet, merge_in, plans_of

from tomesd_plus import apply_token_merging, remove_token_merging
from tomesd_plus.merging.attachment import attachments_on

TIMESTEPS = torch.tensor([900, 880, 860, 840, 820])


@torch.no_grad()
def outputs(unet, timesteps=TIMESTEPS, batches=None, drift=0.02):
    """The UNet's outputs for inputs that change a little from step to step."""
    generator = torch.Generator().manual_seed(5)
    result, sample = [], INPUTS["sample"]
    for timestep, batch in zip(timesteps, batches or [2] * len(timesteps)):
        sample = sample + drift * torch.randn(sample.shape, generator=generator)
        text = INPUTS["encoder_hidden_states"][:batch]
        result.append(unet(sample[:batch], timestep, text).sample)
    return result


def test_the_detail_of_a_full_step_is_added_to_merged_ones():
    attn, x = attention_layer()
    layer = OneLayer(attn)
    later = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        kept = layer(x)  # untouched
        attachment = merge_in(layer, ratio=0.5, full_steps=2, destinations="fixed")
        assert torch.equal(layer(x), kept)
        begin_call(attachment, timestep=900)
        result = layer(later)
        plan = next(iter(plans_of(attachment).values()))
        plain_layer = OneLayer(attention_layer()[0])
        plain = merge_in(plain_layer, ratio=0.5, destinations="fixed")
        begin_call(plain, timestep=900)
        copied = plain_layer(later)
    expected = copied + kept - plan.unmerge(plan.merge(kept))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert (result - copied).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": ["mlp"]},
        {"layers": ["cross_attention"]},
        {"layers": "block"},
        {"sides": "queries"},
        {"mode": "prune"},
    ],
)
def test_full_steps_are_untouched_and_the_others_are_closer_than_without(options):
    plain = outputs(make_unet())
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, full_steps=3, **options)
    kept = outputs(unet)
    assert [torch.equal(a, b) for a, b in zip(kept, plain)] == [True, False, False, True, False]
    assert [bool(step.removed) for step in report.steps] == [False, True, True, False, True]
    unet = make_unet()
    apply_token_merging(unet, ratio=0.5, **options)
    copied = outputs(unet)
    for index in (1, 2, 4):
        error, other = ((r[index] - plain[index]).square().mean() for r in (kept, copied))
        assert error < other / 2


def test_a_generation_a_batch_and_a_size_begin_with_a_full_step():
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, full_steps=3)
    outputs(unet)
    outputs(unet, TIMESTEPS.clone())  # a new generation, in the middle of the cadence
    assert [bool(step.removed) for step in report.steps] == [False, True, True, False, True]
    outputs(unet, TIMESTEPS.clone(), batches=[2, 2, 1, 1, 1])  # guidance switched off
    assert [bool(step.removed) for step in report.steps] == [False, True, False, True, True]
    assert report.kept_bytes > 0
    remove_token_merging(unet)
    assert report.kept_bytes == 0


def test_calls_at_one_noise_level_are_one_step():
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, full_steps=2)
    outputs(unet, torch.tensor([900, 800, 800, 700, 700, 600]))
    assert [bool(step.removed) for step in report.steps] == [False, True, True, False, False, True]


def test_only_layers_that_are_merged_are_kept():
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, full_steps=2, layers=["self_attention", "mlp"], max_downsample=1)
    outputs(unet, TIMESTEPS[:1])
    one = 2 * 256 * 16 * 4  # bytes of an output at the first level
    assert report.kept_bytes == 2 * 3 * one  # attention and MLP of its three blocks


def test_each_of_several_calls_a_step_keeps_its_own_plans_and_details():
    """Guidance branch by branch: the second branch gets nothing of the first."""
    timesteps = torch.tensor([900, 800, 700])
    samples = [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    text = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(2))
    together, alone = [], []
    with torch.no_grad():
        for outputs, branches in ((together, [(0, 1)]), (alone, [(0,), (1,)])):
            for chosen in branches:
                unet = make_unet()
                apply_token_merging(unet, ratio=0.5, plan_every=3, full_steps=3, destinations="fixed")
                outputs += [unet(samples[i], t, text).sample for t in timesteps for i in chosen]
    assert all(torch.equal(together[2 * k + i], alone[3 * i + k]) for k in range(3) for i in (0, 1))


@pytest.mark.parametrize("options", [{"full_steps": 2}, {"plan_every": 4}])
def test_merging_keeps_little_of_calls_at_one_timestep_for_ever(options):
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, plan_per="block", **options)
    sizes = []
    with torch.no_grad():
        for seed in range(12):
            unet(noise(seed), 500, TEXT)
            (attachment,) = attachments_on(unet)
            sizes.append(report.kept_bytes + 1000 * len(plans_of(attachment)))
    assert max(sizes) > 0 and len(set(sizes[5:])) == 1 and sizes[-1] <= max(sizes[:5])


def test_merged_views_of_a_panorama_keep_nothing_of_each_other():
    """More calls a step than branches of guidance could make: each merges as if nothing had been kept."""
    plain, detailed = make_unet(), make_unet()
    apply_token_merging(plain, ratio=0.5)
    report = apply_token_merging(detailed, ratio=0.5, full_steps=2)
    with torch.no_grad():
        for timestep in torch.tensor([900, 880, 860, 840]):
            for view in range(6):
                made = detailed(noise(view), timestep, TEXT).sample
                if report.steps[-1].removed:
                    assert torch.equal(made, plain(noise(view), timestep, TEXT).sample)
    assert [bool(step.removed) for step in report.steps] == ([False] * 6 + [True] * 6) * 2 and report.kept_bytes == 0


def test_tiles_of_unlike_size_keep_their_cadence():
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, full_steps=2)
    with torch.no_grad():
        for timestep in torch.tensor([900, 880, 860, 840]):
            for view in range(6):
                unet(noise(view)[..., : 8 if view == 5 else 16], timestep, TEXT)
    assert [bool(step.removed) for step in report.steps[12:]] == [False] * 6 + [True] * 6


def matchings(monkeypatch):
    from tomesd_plus.merging import planner

    count = []
    match = planner.match
    monkeypatch.setattr(planner, "match", lambda *args, **kwargs: count.append(0) or match(*args, **kwargs))
    return count


def test_branches_of_unlike_batch_keep_details_and_plans_of_their_own(pipe, monkeypatch):
    """One call a branch, of two samples and of one: neither takes the other for a change of size."""
    unet, plain = pipe.unet, copy.deepcopy(pipe.unet)
    apply_token_merging(unet, ratio=0.5, full_steps=3, plan_every=3)
    count = matchings(monkeypatch)
    per_step, errors = [], []
    with torch.no_grad():
        for timestep in torch.tensor([900, 895, 890, 885]):
            for batch in (2, 1):
                arguments = INPUTS["sample"][:batch], timestep, INPUTS["encoder_hidden_states"][:batch]
                errors.append((unet(*arguments).sample - plain(*arguments).sample).square().mean().item())
            per_step.append(len(count))
            count.clear()
    assert per_step == [0, 4, 0, 0]
    assert [error == 0 for error in errors] == [True, True, False, False, False, False, True, True]
