"""Configurations as values: pickled, copied, compared, and each with its own."""

import copy
import pickle

import pruna_tools  # noqa: F401
import pytest
from pruna import SmashConfig

from tomesd_plus.presets import PRESETS

KINDS = {
    "empty": [],
    "others": {"deepcache": {"interval": 4}},
    "layers": {"tome_sd": {"layers": ["self_attention", "mlp"]}},
    "preset": {"tome_cache": {"preset": PRESETS["fast"]}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_are_equal(kind):
    config = SmashConfig(KINDS[kind], device="cpu")
    values = dict(config._configuration)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config and dict(other._configuration) == values
    other.add({"tome_sd": {"layers": "mlp"}})
    assert other != config and dict(config._configuration) == values


def test_a_value_that_is_changed_is_changed_in_its_own_configuration_only():
    first, second = (SmashConfig(KINDS["layers"] | KINDS["preset"], device="cpu") for _ in range(2))
    first["tome_sd_layers"].append("nonsense")
    first["tome_cache_preset"]["preset"]["description"] = "nonsense"
    third = SmashConfig(KINDS["layers"] | KINDS["preset"], device="cpu")
    for other in (second, third):
        assert other["tome_sd_layers"] == ["self_attention", "mlp"]
        assert other["tome_cache_preset"]["preset"]["description"] == PRESETS["fast"].description
