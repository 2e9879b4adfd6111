"""Plans shared by blocks and by steps, and blocks that are merged as a whole."""

import torch
from conftest import INPUTS, attention_layer, make_unet, merge_in, plans_of
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0

from tomesd_plus import StepsSchedule, apply_token_merging, remove_token_merging
from tomesd_plus.merging import planner
from tomesd_plus.merging.attachment import attachments_on


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


def test_a_block_merged_as_a_whole_adds_to_each_token_what_its_group_got():
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=16).eval()
    model = _OneBlock(block)
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    attachment = merge_in(model, ratio=0.5, layers="block", proportional_attention=False)
    with torch.no_grad():
        merged_output = model(x, text)
        plan = next(iter(plans_of(attachment).values()))
        attachment.detach()
        block.attn1.set_processor(AttnProcessor2_0())
        short = plan.merge(x)
        expected = x + plan.unmerge(block(short, encoder_hidden_states=text) - short)
    assert plan.removed == 32
    torch.testing.assert_close(merged_output, expected)


class _SideBySide(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


class _OneBlock(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, text):
        return self.block(x, encoder_hidden_states=text)
