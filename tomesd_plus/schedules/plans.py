"""What runs at each step, a letter a step, also where the steps are others than those that it was made for."""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

from tomesd_plus.schedules.checks import is_number

Depth = Literal["F", "C", "S"]
"""Full: all layers run. Cached: the outer ones do. Skipped: nothing runs."""
DEPTHS = "FCS"
MOST_STEPS = 1000
SAME = 1e-6  # noise levels that differ by less are one


@dataclass(frozen=True)
class StepPlan:
    """What runs at each step of a generation: F in full, C its outer layers, S nothing.

    Args:
        letters: One of F, C and S for each step, from the first; a generation's first step is full whatever it says.
        noise_levels: Of each step, falling. With them a generation of another number of steps, or one that begins
            later as image-to-image does, has the letters where the noise levels have them: a step takes the deepest of
            those between the step before it and itself, F before C before S. However many steps there are, no more of
            them in a row are skipped, or go without a full one, than in the plan itself. Without noise levels, letters
            go by the step's number, and steps beyond the last run in full.
        repeats: The letters begin anew after the last of them, for any number of steps. The last step of a schedule is
            full then: no later one makes up for its error.

    Raises:
        ValueError: There are no letters, others, or more than 1,000; or the noise levels do not fall from 1 to 0, or
            are not as many.

    Example:
        >>> plan = StepPlan("FSCS", noise_levels=(0.9, 0.7, 0.5, 0.3))
        >>> [plan.at_level(before, level) for before, level in ((None, 0.9), (0.9, 0.5), (0.5, 0.1))]
        ['F', 'C', 'S']
    """

    letters: str
    noise_levels: tuple[float, ...] | None = None
    repeats: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.letters, str) or not self.letters or set(self.letters) - set(DEPTHS):
            raise ValueError(f"a plan must be a word of the letters F, C and S, a letter a step, not {self.letters!r}")
        if len(self.letters) > MOST_STEPS:
            raise ValueError(f"a plan may have {MOST_STEPS} steps at most, not {len(self.letters)}")
        if not isinstance(self.repeats, bool):
            raise ValueError(f"repeats must be true or false, not {self.repeats!r}")
        if self.noise_levels is None:
            return
        if self.repeats:
            raise ValueError("a plan that repeats has letters for any number of steps: give it no noise levels")
        levels = tuple(self.noise_levels)
        object.__setattr__(self, "noise_levels", levels)
        if not all(is_number(each) and 0 <= each <= 1 for each in levels):
            raise ValueError("the noise levels of a plan must be numbers in [0, 1]")
        if len(levels) != len(self.letters) or any(late >= early for early, late in pairwise(levels)):
            raise ValueError(f"a plan of {len(self.letters)} steps needs as many noise levels, which fall")

    def longest_without(self, depths: str) -> int:
        """The most steps in a row that have none of certain letters.

        Example:
            >>> StepPlan("FSSCSF").longest_without("F"), StepPlan("FSSCSF").longest_without("FC")
            (4, 2)
        """
        return max(map(len, re.split(f"[{depths}]", self.letters)))

    def at_number(self, number: int, last: bool = False) -> Depth:
        """The depth of a step.

        Args:
            number: Of the step, counted from 0.
            last: Whether it is known to be the schedule's last one.

        Example:
            >>> plan = StepPlan("FSC", repeats=True)
            >>> "".join(plan.at_number(number, last=number == 7) for number in range(8))
            'FSCFSCFF'
        """
        if self.repeats:
            return "F" if last else cast(Depth, self.letters[number % len(self.letters)])
        return cast(Depth, self.letters[number]) if number < len(self.letters) else "F"

    def at_level(self, before: float | None, level: float) -> Depth:
        """The depth of a step by noise levels; takes steps in either direction.

        Args:
            before: Of the step before it; ``None`` for a generation's first.
            level: Of the step.
        """
        assert self.noise_levels is not None
        levels = self.noise_levels
        low, high = (level, before) if before is None or before > level else (before, level)
        passed = [
            letter
            for number, (letter, each) in enumerate(zip(self.letters, levels))
            if low - SAME <= each <= (1.0 if high is None else high) + SAME
            and (before is None or (number and abs(each - before) > SAME))  # the first letter is the first step's
        ]
        if not passed:  # more steps than the plan has: none of its own lies here, so as those around it
            later = next((letter for letter, each in zip(self.letters, levels) if each < level), None)
            earlier = [letter for letter, each in zip(self.letters, levels) if each > level]
            around = [letter for letter in (later, earlier[-1] if earlier else None) if letter is not None]
            passed = [letter for letter in around if letter != "F"][:1] or ["F"]
        return cast(Depth, min(passed, key=DEPTHS.index))
