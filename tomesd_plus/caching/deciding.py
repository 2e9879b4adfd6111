"""Which kind of step one is: full, cached or skipped, and why."""

from tomesd_plus.caching.config import FeatureCacheConfig
from tomesd_plus.caching.forecast import Features
from tomesd_plus.caching.generation import Generation, Kind, WhyFull
from tomesd_plus.host.step import Step
from tomesd_plus.schedules.plans import Depth


class Deciding:
    """Reads off a generation what its next step runs; nothing is changed by asking.

    Args:
        config: When a step is full, and what the others run.
    """

    def __init__(self, config: FeatureCacheConfig) -> None:
        self.config = config
        self.skipped: frozenset[str] = frozenset()  # the layers that cached steps skip

    def chosen(self, generation: Generation, step: Step, as_dict: bool | None) -> tuple[Kind, WhyFull | None]:
        """What a step runs whatever the early feature says, and why if that is all.

        Args:
            generation: That of the step.
            step: The latest, or the one that comes next.
            as_dict: What the call is to return; ``None`` if that does not matter.
        """
        letter = self._letter(generation, step)
        less: Kind = "skipped" if letter == "S" or (letter is None and self.config.branch == "nothing") else "cached"
        reason = self._why_full(generation, step, letter, less == "skipped", as_dict)
        return (less, None) if reason is None else ("full", reason)

    def _letter(self, generation: Generation, step: Step) -> Depth | None:
        plan = self.config.plan
        if plan is None:
            return None
        if plan.noise_levels is None:
            return plan.at_number(step.number, step.last)
        if step.last and plan.letters[-1] == "F":
            return "F"  # at other numbers of steps the last one's noise level may be another
        letter = plan.at_level(generation.before(step), step.noise_level)
        kept, outputs = generation.record.features.get(step.call), generation.record.outputs.get(step.call)
        ran = outputs[-1].step.number if outputs else step.number
        full = kept.step.number if kept is not None else ran
        if step.number - full > plan.longest_without("F"):
            return "F"
        return "C" if letter == "S" and step.number - ran > plan.longest_without("FC") else letter

    def _why_full(
        self, generation: Generation, step: Step, letter: Depth | None, skip: bool, as_dict: bool | None
    ) -> WhyFull | None:
        """Why a step is full; ``None`` if it is not."""
        if step.ambiguous:
            return WhyFull.ambiguous
        if generation.maps_are_read:
            return WhyFull.attention_maps
        output = next(reversed(generation.record.outputs.get(step.call, ())), None) if skip else None
        kept = generation.record.features.get(step.call)
        complete = kept is not None and self.complete(kept)
        last = output.step if output is not None else kept.step if kept is not None and complete and not skip else None
        if last is None:
            return WhyFull.first_step if step.number == 0 else WhyFull.nothing_kept
        if not step.same_size(last):
            return WhyFull.other_size
        if output is not None and as_dict not in (None, output.as_dict):
            return WhyFull.other_form
        if letter == "F":
            return WhyFull.listed
        if self.config.full_steps is not None:
            return WhyFull.listed if step.number in self.config.full_steps else None
        age = step.number - last.number
        if letter is None and age >= self.config.interval_at(step.noise_level):
            return WhyFull.interval
        return WhyFull.same_noise_level if age == 0 else None

    def complete(self, kept: Features) -> bool:
        """False if the step that left it has failed on its way."""
        return kept.outputs.keys() == self.skipped

    def full_before(self, kept: Features | None, step: Step) -> Features | None:
        """What the last full step before a full one left, where it makes a trend."""
        if kept is not None and kept.step.number == step.number:
            kept = kept.before
        if not self.config.forecast or kept is None or not self.complete(kept) or not step.same_size(kept.step):
            return None
        return Features(kept.step, kept.outputs)
