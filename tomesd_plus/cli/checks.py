"""Options of ``tomesd-plus evaluate`` that have no effect: an error, or a line that says so."""

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

import typer

from tomesd_plus.cli.common import fail, say
from tomesd_plus.evaluation.names import INCEPTION, TINY

if TYPE_CHECKING:
    from tomesd_plus.evaluation.generation.sharding import Share


class Stage(StrEnum):
    """Which pass to run."""

    all = "all"
    generate = "generate"
    score = "score"


SCORES = {"features", "reference", "reference_split", "reference_column", "inception_weights", "resamples", "lpips"}
BOTH = {"stage", "out", "device"}


def check_options(context: typer.Context, stage: Stage, share: "Share") -> None:
    """Refuse options of the pass that does not run, and those without effect beside another option."""
    given = {
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    wrong = {Stage.all: set(), Stage.generate: given & SCORES, Stage.score: given - SCORES - BOTH}[stage]
    if wrong:
        fail(f"'evaluate {stage}' does not take {_options(wrong)}: give it to the other pass")
    if share.count > share.launched and given & SCORES:
        fail(f"a shard is not scored, so {_options(given & SCORES)} does nothing: give it to 'evaluate score'")
    if "equal_time" in given and context.params["equal_time"] and not context.params["timed_runs"]:
        fail("--equal-time needs the speeds that --timed-runs 0 leaves out")


def check_features(names: Sequence[str], reference: str | None, inception_weights: str | None) -> None:
    """Refuse options that give no figure, and say which figures will be missing."""
    if inception_weights is not None and INCEPTION not in names:
        fail("--inception-weights needs --features inception")
    if reference is not None and not names:
        fail("--reference needs --features")
    if reference is None and INCEPTION in names:
        fail("--features inception needs --reference: FID and KID are distances to its pictures")
    if not names:
        say("No distances and no CLIP scores: they need --features, and distances --reference.")
    elif reference is None and list(names) != [TINY]:
        say("No distances, only CLIP scores: distances need --reference.")


def _options(names: set[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
