"""What a whole generation runs, what it costs, and the plans next to it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from tomesd_plus.schedules.checks import is_number

Merging = Literal["none", "cached", "all"]
"""Merge nothing; three quarters of the tokens on cached steps; and half of them on full steps too, or on these alone
where there are no cached ones."""


@dataclass(frozen=True)
class Costs:
    """What a step of each kind costs, as a share of a full one.

    Args:
        cached: Its outer layers run.
        skipped: Nothing runs.
        cached_merged: A cached step that merges three quarters of its tokens; ``None``: never chosen.
        full_merged: A full step that merges half of the tokens in the layers which cached steps skip, or in a
            transformer in all; likewise.

    Raises:
        ValueError: A cost is no number in [0, 2].
    """

    cached: float
    skipped: float = 0.0
    cached_merged: float | None = None
    full_merged: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            optional = value is None and name.endswith("merged")
            if not optional and not (is_number(value) and 0 <= value <= 2):
                raise ValueError(f"the cost {name} must be a share of a full step's in [0, 2], not {value!r}")

    @classmethod
    def of(cls, given: "Costs | Mapping[str, float]") -> "Costs":
        """Costs as they are, or from a mapping of their names.

        Args:
            given: Either; ``cached`` must be among the names.

        Raises:
            ValueError: It is something else, or has other names.
        """
        if isinstance(given, Costs):
            return given
        names = {"cached", "skipped", "cached_merged", "full_merged"}
        if not isinstance(given, Mapping) or not set(given) <= names or "cached" not in given:
            raise ValueError(
                f"costs must map 'cached', and any of {', '.join(sorted(names))}, to shares, not {given!r}"
            )
        return cls(**given)

    def named(self) -> dict[str, float]:
        """The costs that are known, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def of_letter(self, letter: str, merging: Merging = "none") -> float:
        """The cost of a step.

        Args:
            letter: F, C or S: full, cached or skipped.
            merging: What the plan merges; its kind's cost must be known.
        """
        if letter == "S":
            return self.skipped
        if letter == "C":
            return self.cached if merging == "none" else cast(float, self.cached_merged)
        return cast(float, self.full_merged) if merging == "all" else 1.0


@dataclass(frozen=True)
class Plan:
    """What a generation runs.

    Args:
        letters: F, C or S for each step that is taken.
        forecast: How far cached steps follow the trend.
        order: Of the forecast of skipped calls.
        merging: On which steps tokens are merged.
        solver_steps: With how many the pipeline is called, where that is not as many as there are letters:
            image-to-image takes a part of them.
    """

    letters: str
    forecast: float = 1.0
    order: int | None = 1
    merging: Merging = "none"
    solver_steps: int | None = None

    @property
    def steps(self) -> int:
        """With how many steps the pipeline is called."""
        return len(self.letters) if self.solver_steps is None else self.solver_steps

    def called_with(self, steps: int) -> "Plan":
        """The same where the pipeline is called with so many steps."""
        return self if steps == self.steps else replace(self, solver_steps=steps)

    def cost(self, costs: Costs, calls: Sequence[int] | None = None) -> float:
        """Of all its calls, in full ones.

        Args:
            costs: Of a call of each kind.
            calls: How many there are at each step; one by default.
        """
        shares = (costs.of_letter(letter, self.merging) for letter in self.letters)
        return sum(share * count for share, count in zip(shares, calls or [1] * len(self.letters), strict=True))

    def __str__(self) -> str:
        return self.letters


def untouched(steps: int) -> Plan:
    """Every step in full."""
    return Plan("F" * steps)


def even(steps: int, full: int, other: str) -> str:
    """So many full steps, spread evenly from the first on, and other ones between.

    Example:
        >>> even(7, 3, "S")
        'FSFSFSS'
    """
    places = {int(number * steps / full) for number in range(full)}
    return "".join("F" if number in places else other for number in range(steps))


def even_plans(steps: int, budget: float, costs: Costs, calls: Sequence[int], caches: bool) -> list[Plan]:
    """The even caches and even skips that cost no more than a budget: of each kind those with most full steps."""
    found = []
    kinds = [("S", 1.0, 1), ("S", 1.0, None)]
    kinds += [("C", 1.0, 1), ("C", 0.85, 1)] if caches else []
    for other, forecast, order in kinds:
        for shape in (even, _every):
            for full in range(steps - 1, 0, -1):
                plan = Plan(shape(steps, full, other), forecast, order)
                if plan.cost(costs, calls) <= budget + 1e-9:
                    found.append(plan)
                    break
    return list(dict.fromkeys(found))


UNITS = "FS", "FC", "FSC", "FCS", "FSS", "FSCS", "FSCC", "FCSS", "FSCSC", "FSSCS"
"""Patterns that are repeated; chosen on five solvers (``results/presets.csv``)."""


def repeated_plans(steps: int, budget: float, costs: Costs, calls: Sequence[int], caches: bool) -> list[Plan]:
    """Short patterns repeated, with a full step at the end and one or two at the beginning, within a budget."""
    found = []
    for unit in UNITS:
        if "C" in unit and not caches:
            continue
        for begin in ("", "F"):
            letters = (begin + unit * steps)[: steps - 1] + "F"
            plan = Plan(letters, 0.85 if "C" in unit else 1.0)
            if plan.cost(costs, calls) <= budget + 1e-9:
                found.append(plan)
    return list(dict.fromkeys(found))


def _every(steps: int, full: int, other: str) -> str:
    """Every n-th step in full: the densest with at most so many full ones."""
    interval = -(-steps // full)
    return "".join(other if number % interval else "F" for number in range(steps))


def neighbours(plan: Plan, caches: bool) -> Iterator[Plan]:
    """The plans that differ in one step's letter, or in two whose letters are swapped."""
    letters = plan.letters
    seen = {letters}
    kinds = "FCS" if caches else "FS"
    for first in range(1, len(letters)):
        changed = [letters[:first] + kind + letters[first + 1 :] for kind in kinds]
        for second in range(first + 1, len(letters)):
            if letters[first] != letters[second]:
                swapped = letters[:first] + letters[second] + letters[first + 1 : second] + letters[first]
                changed.append(swapped + letters[second + 1 :])
        for each in changed:
            if each not in seen:
                seen.add(each)
                yield replace(plan, letters=each)
