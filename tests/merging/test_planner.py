"""The planner: the levels of a step, and plans that blocks, steps and calls share or do not share."""

import pytest
import torch
from cache_tools import TEXT, noise
from conftest import INPUTS, attention_layer, make_unet, merge_in, plans_of
from diffusers.models.attention_processor import AttnProcessor2_0

from tomesd_plus import AdaptiveRatio, StepsSchedule, ToMeConfig, apply_token_merging, remove_token_merging
from tomesd_plus.host.step import Step
from tomesd_plus.merging import planner
from tomesd_plus.merging.attachment import attachments_on
from tomesd_plus.merging.planner import levels_of


def _matchings(unet, monkeypatch, timesteps, batches=None):
    """How often tokens are matched in each of several calls."""
    counts = []
    match = planner.match
    monkeypatch.setattr(planner, "match", lambda *args: counts.append(1) or match(*args))
    result = []
    for timestep, batch in zip(timesteps, batches or [2] * len(timesteps)):
        counts.clear()
        inputs = {name: value[:batch] for name, value in INPUTS.items()}
        with torch.no_grad():
            unet(**inputs, timestep=timestep)
        result.append(len(counts))
    return result


def test_plans_are_shared_as_configured(monkeypatch):
    counts = {}
    for plan_per in ("block", "stage", "level"):
        unet = make_unet()
        apply_token_merging(unet, ratio=0.5, plan_per=plan_per, max_downsample=2)
        with monkeypatch.context() as patch:
            counts[plan_per] = _matchings(unet, patch, [700])[0]
    blocks = sum(name.endswith("attn1") for name, _ in make_unet().named_modules())
    assert counts["block"] == blocks > counts["stage"] > counts["level"] == 2


def test_plans_are_used_for_as_many_steps_as_configured_and_no_longer(monkeypatch):
    timesteps = torch.tensor([900, 800, 700, 600, 500])
    unet = make_unet()
    apply_token_merging(unet, ratio=0.5, plan_every=2, plan_per="block")
    full = _matchings(unet, monkeypatch, timesteps)
    assert full == [3, 0, 3, 0, 3]
    again = _matchings(unet, monkeypatch, timesteps.clone())  # a new generation
    assert again == full
    changed = _matchings(unet, monkeypatch, timesteps.clone()[:3], batches=[2, 1, 1])  # guidance switched off
    assert changed == [3, 3, 3]
    remove_token_merging(unet)
    apply_token_merging(unet, ratio=StepsSchedule((0.75, 0.5, 0.25)), plan_every=5, plan_per="block")
    assert _matchings(unet, monkeypatch, torch.tensor([900, 800, 500, 400, 100])) == [3, 0, 3, 0, 3]  # other ratios


def test_reused_plans_are_those_of_the_step_that_made_them():
    timesteps = torch.tensor([900, 800])
    outputs = {}
    for every in (1, 2):
        unet = make_unet()
        apply_token_merging(unet, ratio=0.5, plan_every=every, destinations="fixed")
        with torch.no_grad():
            unet(**INPUTS, timestep=timesteps[0])
            (attachment,) = attachments_on(unet)
            first = dict(plans_of(attachment))
            unet(INPUTS["sample"].flip(-1), timesteps[1], INPUTS["encoder_hidden_states"])
            outputs[every] = [plans_of(attachment)[key] is plan for key, plan in first.items()]
    assert outputs == {1: [False, False], 2: [True, True]}


def test_a_shared_plan_does_what_plans_of_ones_own_do_where_they_are_alike(monkeypatch):
    outputs, counts = {}, []
    match = planner.match
    monkeypatch.setattr(planner, "match", lambda *args: counts.append(1) or match(*args))
    layers = torch.nn.ModuleList(attention_layer()[0] for _ in range(2))
    torch.nn.init.normal_(layers[1].to_v.weight)
    model = _SideBySide(layers)
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    for plan_per in ("block", "level"):
        merge_in(model, ratio=0.5, plan_per=plan_per)
        outputs[plan_per] = model(x)
        for attn in layers:
            attn.set_processor(AttnProcessor2_0())
    assert torch.equal(outputs["block"], outputs["level"]) and not torch.equal(outputs["block"], plain)
    assert len(counts) == 2 + 1


def test_kept_plans_never_serve_another_size_batch_or_model():
    """Two models in turn, steps of one width and of the other, a batch of two and of one: each as if it were alone."""
    timesteps = torch.tensor([900, 880, 860, 840])
    scales = [(16, 8, 2), (8, 16, 2), (8, 16, 1), (16, 8, 1)]  # as many tokens, but of other places

    def calls(unets):
        schedules = [timesteps.clone() for _ in unets]
        for index, (height, width, batch) in enumerate(scales):
            for seed, (unet, schedule) in enumerate(zip(unets, schedules)):
                sample = torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))
                text = INPUTS["encoder_hidden_states"][:batch]
                yield seed, unet(sample, schedule[index], text).sample

    def merging(seed, plan_every):
        unet = make_unet()
        apply_token_merging(unet, ratio=0.5, plan_every=plan_every, seed=seed)
        return unet

    with torch.no_grad():
        together = list(calls([merging(seed, plan_every=4) for seed in range(2)]))
        alone = list(calls([merging(seed, plan_every=1) for seed in range(2)]))
    for (_, one), (_, other) in zip(together, alone, strict=True):
        assert torch.equal(one, other)


class _SideBySide(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


def test_views_of_a_panorama_do_not_get_each_others_plans():
    """Whatever their order, which need not be the same at every step."""
    made = {}
    for every in (1, 4):
        unet = make_unet()
        apply_token_merging(unet, ratio=0.5, plan_every=every)
        with torch.no_grad():
            made[every] = [
                unet(noise(view), timestep, TEXT).sample
                for index, timestep in enumerate(torch.tensor([900, 880, 860]))
                for view in (range(6) if index % 2 else reversed(range(6)))
            ]
    assert all(map(torch.equal, made[1], made[4]))


def test_a_smooth_schedule_does_not_pile_up_plans():
    unet = make_unet()
    apply_token_merging(unet, plan_every=8, plan_per="block")
    (attachment,) = attachments_on(unet)
    with torch.no_grad():
        for timestep in torch.tensor([900, 800, 700, 600, 500]):
            unet(noise(), timestep, TEXT)
            assert len(plans_of(attachment)) == 3


def _levels(height, width, noise_level=1.0, **options):
    step = Step(0, 999 * noise_level, noise_level, height, width, 1, 0, 0, False, True)
    config = ToMeConfig(**options)
    return levels_of(step, config, config.schedules, None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("height", "width", "tokens", "grid"),
    [(64, 64, 4096, (1, 64, 64)), (64, 64, 1024, (2, 32, 32)), (13, 9, 117, (1, 13, 9)), (13, 9, 35, (2, 7, 5)),
     (13, 9, 12, (4, 4, 3)), (13, 9, 118, None), (96, 64, 96, (8, 12, 8))],
)  # fmt: skip
def test_levels_are_found_by_token_count(height, width, tokens, grid):
    level = _levels(height, width).get(tokens)
    assert (level and (level.downsample, level.height, level.width)) == grid


def test_what_is_removed_and_why_not():
    levels = _levels(64, 64, ratio={1: 0.5, 2: 0.0, 8: 0.001})
    assert [level.removed for level in levels.values()] == [2048, 0, 0, 0]
    assert [level.cells is not None for level in levels.values()] == [True, False, False, False]
    reasons = [str(level.reason) for level in levels.values()]
    assert (
        reasons[0] == "None"
        and "ratio is 0" in reasons[1]
        and "not merged" in reasons[2]
        and "less than one" in reasons[3]
    )
    assert "no cell fits" in str(_levels(3, 64, ratio=0.5, cell_size=(4, 4), max_downsample=1)[192].reason)
    assert _levels(5, 5, ratio=0.75)[25].removed == 12  # what fills no cell stays
    assert _levels(64, 64, ratio=AdaptiveRatio(0.9, (0.25, 0.5)))[4096].removed == 2048  # at most
    noisy, clean = (_levels(64, 64, level)[4096].removed for level in (1.0, 0.0))
    assert noisy == int(4096 * 0.7) and clean == int(4096 * 0.3)
