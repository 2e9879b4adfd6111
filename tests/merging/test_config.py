from dataclasses import replace

import pytest

from tomesd_plus import AdaptiveRatio, ConstantSchedule, CosineSchedule, LinearSchedule, ToMeConfig


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
        ({"ratio": 0.8, "schedule": "linear"}, "larger cell_size"),
        ({"ratio": LinearSchedule(0.6, 0.2), "schedule": "linear"}, "to be numbers"),
        ({"ratio": 0.5, "more_at": "clean"}, "more_at needs a schedule"),
        ({"more_at": "dusk"}, "'noisy' or 'clean'"),
        ({"ratio": 0.5, "schedule": "sine"}, "constant, linear, cosine, steps, auto"),
        ({"ratio": 0.5, "schedule": "linear", "more_at": "dusk"}, "'noisy' or 'clean'"),
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
        ({"whole_every": 1}, "whole_every"),
        ({"whole_every": 4, "keys_values_only": True}, "no detail"),
        ({"queries_only": True, "keys_values_only": True}, "only one"),
        ({"queries_only": True, "merge_block": True}, "only one"),
        ({"queries_only": True, "merge_self_attention": False, "merge_mlp": True}, "queries_only needs"),
        ({"merge_block": True, "metric": "keys"}, "merge_block"),
        ({"merge_block": True, "merge_mlp": True}, "merges all layers"),
        ({"ratio": AdaptiveRatio(ratios=(0.5, 0.9))}, "larger cell_size"),
        ({"merge_self_attention": False}, "nothing to merge"),
        ({"merge_self_attention": False, "merge_mlp": True, "keys_values_only": True}, "keys_values_only"),
    ],
)
def test_what_is_out_of_range_is_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        ToMeConfig(**options)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "steps", "auto"])
def test_a_schedule_by_name_has_the_ratio_as_its_mean(name):
    config = ToMeConfig(ratio={1: 0.4, 2: 0.2}, cached_ratio=0.5, schedule=name)
    assert [schedule.mean() for schedule in config.schedules.values()] == pytest.approx([0.4, 0.2], abs=1e-3)
    assert config.cached_schedules[1].mean() == pytest.approx(0.5, abs=1e-3)
    assert replace(config, window=4).schedules == config.schedules


def test_a_schedule_by_name_goes_both_ways():
    noisy, clean = (ToMeConfig(schedule="linear", more_at=end).schedules[1] for end in ("noisy", "clean"))
    assert noisy == clean.reversed() and noisy(1.0) > noisy(0.0)
    assert ToMeConfig(more_at="clean").schedules[1] == CosineSchedule().reversed()


def test_larger_cells_allow_larger_ratios():
    assert ToMeConfig(ratio=0.9, cell_size=(4, 4)).schedules[1](0.5) == 0.9
