"""The plans of least error at a cost, by dynamic programming over the steps."""

from collections.abc import Sequence
from math import ceil

from tomesd_plus.tuning.errors import Errors
from tomesd_plus.tuning.plans import Costs, Merging, Plan

BUCKETS = 80
"""Costs are told apart as finely as the largest budget over this."""
BEAM = 60
"""Ways that are followed from each step for each cost: the best of those that are gone on from differently."""

_State = tuple[int | None, int, tuple[int, ...]]  # the latest two full steps, and the latest three that ran


def best_plans(
    errors: Errors,
    costs: Costs,
    calls: Sequence[int],
    budgets: Sequence[float],
    forecast: float = 1.0,
    order: int | None = 1,
    merging: Merging = "none",
) -> list[Plan | None]:
    """For each budget the plan of least error.

    Ways through the steps meet where the same full steps and the same calls that ran are the latest: what follows is
    the same then, so only the better of those of a cost is followed. Errors of different steps add up, each weighted
    by what it does to the picture. The states and the sum follow DPCache (2025), which chose Flux's full steps so.

    Args:
        errors: Along a recorded generation.
        costs: Of a call of each kind.
        calls: How many there are at each step.
        budgets: Costs that a plan may have, in full calls.
        forecast, order, merging: As in :class:`Plan`.

    Returns:
        A plan for each budget; ``None`` where the budget is less than one step's.
    """
    most = max(budgets)
    width = most / BUCKETS
    share = {letter: costs.of_letter(letter, merging) for letter in "FCS"} if errors.features is not None else {}
    share = share or {"F": costs.of_letter("F", merging), "S": costs.skipped}
    longest = max(4, ceil(2 * errors.steps / max(1.0, min(budgets)))) + 1  # without a full step
    start: _State = (None, 0, (0,))
    ways: dict[int, dict[_State, tuple[float, float, str]]] = {
        int(share["F"] * calls[0] / width): {start: (0.0, share["F"] * calls[0], "F")}
    }
    for step in range(1, errors.steps):
        following: dict[int, dict[_State, tuple[float, float, str]]] = {}
        for states in ways.values():
            for (before, full, ran), (error, cost, letters) in states.items():
                for letter, each in share.items():
                    spent = cost + each * calls[step]
                    if spent > most + 1e-9 or (letter != "F" and step - full >= longest):
                        continue
                    state: _State = (before, full, (*ran, step)[-3:])
                    if letter == "F":
                        state, added = (full, step, state[2]), 0.0
                    elif letter == "C":
                        added = errors.cached(before, full, step, forecast)
                    else:
                        state, added = (before, full, ran), errors.skipped(ran, step, order)
                    bucket = following.setdefault(int(spent / width), {})
                    if state not in bucket or error + added < bucket[state][0]:
                        bucket[state] = error + added, spent, letters + letter
        ways = {
            bucket: dict(sorted(states.items(), key=lambda item: item[1][0])[:BEAM])
            for bucket, states in following.items()
        }
    ends = sorted((way for states in ways.values() for way in states.values()), key=lambda way: way[0])
    found = (next((letters for _, cost, letters in ends if cost <= budget + 1e-9), None) for budget in budgets)
    return [None if letters is None else Plan(letters, forecast, order, merging) for letters in found]
