"""The levels of a step: found by token count, with their removals and reasons."""

import pytest
import torch

from tomesd_plus import AdaptiveRatio, ToMeConfig
from tomesd_plus.host.step import Step
from tomesd_plus.merging.planner import levels_of


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
