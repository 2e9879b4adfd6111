"""The time that a call of a UNet or tower spends in matching, and in merging and unmerging."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from tomesd_plus import tomesd
from tomesd_plus.host.clock import Moment, moment, seconds_between
from tomesd_plus.matching import MergePlan, SequencePlan
from tomesd_plus.merging import planner
from tomesd_plus.merging.planner import Planner
from tomesd_plus.vision.call import LayerCall

WATCHED: dict[str, tuple[tuple[Any, str], ...]] = {
    "matching": (
        (planner, "levels_of"),  # draws the cells
        (Planner, "plan"),
        (tomesd, "draw_destinations"),
        (tomesd, "bipartite_match"),
        (LayerCall, "make_plan"),
    ),
    "merging": (
        *((plan, name) for plan in (MergePlan, SequencePlan) for name in ("merge", "unmerge")),
        (tomesd.TomesdPlan, "merge"),
    ),
}
"""The timed functions: each is an attribute of a module or class."""


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, float]]:
    """Time the functions of :data:`WATCHED` inside a ``with`` block; afterwards the yielded dict has the seconds."""
    seconds = dict.fromkeys(WATCHED, 0.0)
    calls: dict[str, list[tuple[Moment, Moment]]] = {kind: [] for kind in WATCHED}
    inside = False

    def timed(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # a timed function calls another
                return function(*args, **kwargs)
            inside, start = True, moment(device)
            try:
                return function(*args, **kwargs)
            finally:
                calls[kind].append((start, moment(device)))
                inside = False

        return call

    with ExitStack() as stack:
        for kind, functions in WATCHED.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, timed(kind, getattr(owner, name))))
        yield seconds
    seconds |= {kind: sum(seconds_between(*call) for call in of_kind) for kind, of_kind in calls.items()}
