from dataclasses import replace

import pytest

from tomesd_plus import AdaptiveRatio, ConstantSchedule, CosineSchedule, FullSteps, LinearSchedule, ToMeConfig


def test_the_default_merges_more_at_noisy_steps():
    (schedule,) = ToMeConfig().schedules.values()
    assert isinstance(schedule, CosineSchedule) and schedule(1.0) > schedule(0.5) > schedule(0.0) > 0
    assert schedule.mean() == pytest.approx(0.5)


def test_levels_come_from_max_downsample_or_from_a_mapping():
    assert list(ToMeConfig(ratio=0.5, max_downsample=4).schedules) == [1, 2, 4]
    by_level = ToMeConfig(ratio={2: 0.25, 1: LinearSchedule(0.6, 0.2)})
    assert by_level.schedules == {1: LinearSchedule(0.6, 0.2), 2: ConstantSchedule(0.25)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, r"\[0, 1\)"),
        ({"ratio": -0.1}, r"\[0, 1\)"),
        ({"ratio": "half"}, r"\[0, 1\)"),
        ({"ratio": 0.8}, "larger cell_size"),
        ({"ratio": {3: 0.5}}, "levels among"),
        ({"ratio": {}}, "levels among"),
        ({"max_downsample": 3}, "max_downsample must be one of 1, 2, 4, 8"),
        ({"cell_size": (2,)}, "cell_size"),
        ({"cell_size": 2}, "cell_size"),
        ({"cell_size": (0, 2)}, "cell_size"),
        ({"metric": "queries"}, "'keys'"),
        ({"destinations": "center"}, "'fixed'"),
        ({"mode": "drop"}, "'prune'"),
        ({"seed": -1}, "seed"),
        ({"window": 0}, "window"),
        ({"plan_per": "step"}, "'stage'"),
        ({"plan_every": 0}, "plan_every"),
        ({"plan_every": "cached"}, "plan_every"),
        ({"cached_ratio": {3: 0.5}}, "cached_ratio"),
        ({"full_steps": FullSteps("cache", {3: 0.5})}, "full_steps"),
        ({"full_steps": 1}, "full_steps"),
        ({"full_steps": "cached"}, "full_steps"),
        ({"full_steps": 4, "sides": "keys_values"}, "no detail"),
        ({"sides": "left"}, "'queries'"),
        ({"sides": "queries", "layers": "block"}, "needs layers with 'self_attention'"),
        ({"sides": "keys_values", "layers": ["mlp"]}, "needs layers with 'self_attention'"),
        ({"layers": "block", "metric": "keys"}, "'block' measures"),
        ({"layers": []}, "layers must be"),
        ({"layers": None}, "layers must be"),
        ({"layers": ["attention"]}, "layers must be"),
        ({"layers": ["block", "mlp"]}, "layers must be"),
        ({"gate": "auto"}, "'remeasure'"),
        ({"ratio": AdaptiveRatio(ratios=(0.5, 0.9))}, "larger cell_size"),
    ],
)
def test_what_is_out_of_range_is_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        ToMeConfig(**options)


def test_the_same_choice_may_be_written_in_several_ways():
    assert ToMeConfig(layers="mlp").layers == ("mlp",) == ToMeConfig(layers=["mlp", "mlp"]).layers
    assert ToMeConfig(full_steps=4) == ToMeConfig(full_steps=FullSteps(4))
    assert ToMeConfig(cell_size=[4, 4]) == ToMeConfig(cell_size=(4, 4))
    assert ToMeConfig(layers="block") == ToMeConfig(layers="block", metric="block_input")
    changed = replace(ToMeConfig(full_steps="cache"), window=4)
    assert (changed.full_steps, changed.window) == (FullSteps("cache"), 4)


def test_larger_cells_allow_larger_ratios():
    assert ToMeConfig(ratio=0.9, cell_size=(4, 4)).schedules[1](0.5) == 0.9


@pytest.mark.parametrize("options", [{"layers": "block"}, {"layers": ["mlp"]}, {"gate": "on"}])
def test_a_ratio_on_full_steps_needs_self_attention_and_no_gate(options):
    with pytest.raises(ValueError, match="a ratio on full steps"):
        ToMeConfig(full_steps=FullSteps("cache", 0.5), **options)
    with pytest.raises(ValueError, match="every='cache'"):
        FullSteps(2, 0.5)


@pytest.mark.parametrize("options", [{"cached_ratio": 0.9}, {"full_steps": FullSteps("cache", 0.9)}])
def test_cells_bound_the_ratios_under_a_cache_too(options):
    with pytest.raises(ValueError, match="more than cells"):
        ToMeConfig(**options)
