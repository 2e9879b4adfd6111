"""Plans shared by blocks and by steps, and blocks that are merged as a whole."""

import torch
from conftest import INPUTS, make_unet, merge_in
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0

from tomesd_plus import StepsSchedule, apply_token_merging, planner, remove_token_merging
from tomesd_plus.merger import mergers_on


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
            (merger,) = mergers_on(unet)
            first = dict(merger.planner.plans)
            unet(INPUTS["sample"].flip(-1), timesteps[1], INPUTS["encoder_hidden_states"])
            outputs[every] = [merger.planner.plans[key] is plan for key, plan in first.items()]
    assert outputs == {1: [False, False], 2: [True, True]}


def test_a_block_merged_as_a_whole_adds_to_each_token_what_its_group_got():
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=16).eval()
    model = _OneBlock(block)
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    merger = merge_in(model, ratio=0.5, merge_block=True, proportional_attention=False)
    with torch.no_grad():
        merged_output = model(x, text)
        plan = next(iter(merger.planner.plans.values()))
        merger.detach()
        block.attn1.set_processor(AttnProcessor2_0())
        short = plan.merge(x)
        expected = x + plan.unmerge(block(short, encoder_hidden_states=text) - short)
    assert plan.removed == 32
    torch.testing.assert_close(merged_output, expected)


class _OneBlock(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, text):
        return self.block(x, encoder_hidden_states=text)
