"""Hostile inputs through a UNet: a right picture or a clear error, and a usable model afterwards."""

import contextlib
import math

import pytest
import torch
from conftest import make_unet
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tomesd_plus import (
    ToMeProcessor,
    apply_feature_cache,
    apply_preset,
    apply_token_merging,
    remove_feature_cache,
    remove_preset,
    remove_token_merging,
    tomesd,
)

VALUES = ("normal", "zeros", "NaN", "one NaN", "Inf", "huge", "half of it zero")
TEXT = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
USUAL = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(2))


def latents(kind, size, dtype):
    batch = 2 if math.prod(size) < 1000 else 1  # both guidance branches, where that does not take long
    made = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(size[0]))
    if kind == "zeros":
        made = torch.zeros_like(made)
    elif kind == "half of it zero":
        made[..., size[1] // 2 :] = 0
    elif kind == "one NaN":
        made[0, 0, 0, 0] = math.nan
    elif kind in ("NaN", "Inf"):
        made.view(-1)[::3] = math.nan if kind == "NaN" else math.inf
    elif kind == "huge":
        made = made * torch.finfo(torch.float16).max / 8  # float16 overflows on the way
    return made.to(dtype)


ratios = st.floats(0, 0.75) | st.floats(0, 0.999) | st.floats(allow_nan=True, allow_infinity=True)
options = st.fixed_dictionaries(
    {},
    optional={
        "cell_size": st.tuples(st.integers(1, 5), st.integers(1, 5)) | st.sampled_from([(1, 300), (300, 1)]),
        "window": st.sampled_from([None, 1, 2, 8]),
        "max_downsample": st.sampled_from([1, 2, 4, 8]),
        "destinations": st.sampled_from(["random", "fixed"]),
        "metric": st.sampled_from(["attention_input", "block_input", "keys"]),
        "layers": st.sampled_from(["self_attention", "block", ("self_attention", "mlp"), ("cross_attention",)]),
        "sides": st.sampled_from(["both", "keys_values", "queries"]),
        "mode": st.sampled_from(["merge", "prune"]),
        "proportional_attention": st.booleans(),
        "plan_per": st.sampled_from(["block", "stage", "level"]),
        "plan_every": st.sampled_from([1, 2, "cache"]),
        "full_steps": st.sampled_from([None, 2, "cache"]),
        "seed": st.integers(0, 2**70),
    },
)
sizes = st.one_of(  # large ones take seconds: few of them
    *[
        st.tuples(st.integers(1, most), st.integers(1, other))
        for most, other in [(12, 12), (30, 30), (200, 4), (8, 40)] * 3
    ],
    st.tuples(st.integers(1, 200), st.integers(1, 40)),
)
switches = st.sampled_from(["merging", "merging and cache", "bare", "cache", "preset", "drop-in"])
cases = st.tuples(
    switches, ratios, options,
    sizes,
    st.sampled_from(VALUES), st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip


def switch_on(unet, kind, ratio, chosen):
    if kind == "bare":
        unet.set_attn_processor(ToMeProcessor(ratio=ratio, **chosen))
    elif kind == "cache":
        apply_feature_cache(unet, interval=2)
    elif kind == "preset":
        apply_preset(unet, "fast", force=True)
    elif kind == "drop-in":
        cell = chosen.get("cell_size", (2, 2))
        tomesd.apply_patch(unet, ratio=ratio, max_downsample=chosen.get("max_downsample", 1), sy=cell[0], sx=cell[1])
    else:
        apply_token_merging(unet, ratio=ratio, **chosen)
        if kind == "merging and cache":
            apply_feature_cache(unet, interval=2, branch=1)


def switch_off(unet):
    for remove in (remove_preset, remove_feature_cache, remove_token_merging):
        with contextlib.suppress(UserWarning):  # it was not on
            remove(unet)
    tomesd.remove_patch(unet)


class Tried:
    """UNets that serve all examples, so that each also shows that the model is usable after the one before.

    Args:
        counts: Examples by what came of them.
    """

    def __init__(self):
        small = {"block_out_channels": (8, 8), "attention_head_dim": 1, "norm_num_groups": 4}
        self.unets = {dtype: make_unet(**small).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
        self.processors = {dtype: unet.attn_processors for dtype, unet in self.unets.items()}
        self.expected = {dtype: self.run(dtype, USUAL.to(dtype), 1) for dtype in self.unets}
        self.counts = dict.fromkeys(["right", "refused", "not a number before either"], 0)

    @torch.no_grad()
    def run(self, dtype, sample, steps=2):
        return [
            self.unets[dtype](sample, 900 - 300 * step, TEXT[: len(sample)].to(dtype)).sample for step in range(steps)
        ]

    def check(self, case):
        kind, ratio, chosen, size, values, dtype = case
        unet, sample = self.unets[dtype], latents(values, size, dtype)
        before = self.run(dtype, sample)
        try:
            try:
                switch_on(unet, kind, ratio, chosen)
            except (ValueError, TypeError) as error:
                self.counts["refused"] += 1
                valid = 0 <= ratio <= 1 - 1 / math.prod(chosen.get("cell_size", (2, 2))) and not chosen
                assert len(str(error)) > 20 and not valid, error
            else:
                after = self.run(dtype, sample)
                for untouched, merged in zip(before, after, strict=True):
                    assert merged.shape == untouched.shape and merged.dtype == dtype
                    assert merged.isfinite().all() or not untouched.isfinite().all()
                    if kind != "cache" and (ratio == 0 and kind in ("merging", "bare", "drop-in")):
                        assert torch.equal(merged.nan_to_num(), untouched.nan_to_num())
                self.counts["right" if before[0].isfinite().all() else "not a number before either"] += 1
        finally:
            switch_off(unet)
            unet.set_attn_processor(dict(self.processors[dtype]))  # the host empties it
        assert torch.equal(self.run(dtype, USUAL.to(dtype), 1)[0], self.expected[dtype][0])
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


@pytest.fixture(scope="module")
def tried():
    return Tried()


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}
# A picture of few tokens merges nothing, and says so: that is right here.
pytestmark = pytest.mark.filterwarnings("ignore:Token merging has merged nothing:UserWarning")


@settings(max_examples=30, **SETTINGS)
@given(case=cases)
@example(case=("merging", 0.5, {}, (1, 1), "normal", torch.float32))
@example(case=("merging", 0.5, {"cell_size": (300, 1)}, (200, 40), "Inf", torch.float16))
@example(case=("bare", math.nan, {}, (8, 8), "normal", torch.float32))
@example(case=("drop-in", 1.0, {}, (1, 7), "zeros", torch.bfloat16))
@example(case=("drop-in", math.nan, {}, (8, 8), "normal", torch.float32))
def test_hostile_inputs(tried, case):
    tried.check(case)


@pytest.mark.slow
def test_many_hostile_inputs(tried, capsys):
    tried.counts = dict.fromkeys(tried.counts, 0)

    @settings(max_examples=1_200, database=None, **SETTINGS)
    @given(cases)
    def run(case):
        tried.check(case)

    run()
    with capsys.disabled():
        print(f"\nfuzz: {sum(tried.counts.values())} examples through a UNet: {tried.counts}")
    assert sum(tried.counts.values()) >= 1_000 and tried.counts["right"] >= 300
