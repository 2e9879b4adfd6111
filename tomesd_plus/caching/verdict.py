"""Why a generation took nothing from a feature cache, in words, with what to do."""

from collections import Counter

from tomesd_plus.caching.config import FeatureCacheConfig
from tomesd_plus.caching.generation import CacheRecord, WhyFull
from tomesd_plus.host.promise import Promise
from tomesd_plus.host.step import MOST_CALLS

ASKED_FOR = {WhyFull.first_step, WhyFull.listed, WhyFull.interval}
"""Reasons of the configuration itself."""

MENDS = {
    WhyFull.ambiguous: "each step calls the model for several tiles or views, which cannot be told apart",
    WhyFull.other_size: "batch or size changed at each step",
    WhyFull.other_form: "what the calls are to return changed at each step: give return_dict always or never",
    WhyFull.replaced: "the model's forward was replaced after the cache was applied: apply it again",
    WhyFull.same_noise_level: "all steps are at one noise level",
    WhyFull.nothing_kept: "no full step has left all features: its layers were replaced, or have failed",
    WhyFull.changed: "every step changed by more than the threshold: raise it",
    WhyFull.attention_maps: "the pipeline reads attention maps of layers that cached steps would leave out",
}


class Verdict:
    """Judges generation by generation whether anything was cached, and tells the user if not.

    Args:
        config: What was asked for.
    """

    def __init__(self, config: FeatureCacheConfig) -> None:
        self._promise = Promise("A feature cache has cached nothing")
        self._wanted = config.interval != 1 or config.plan is not None or config.full_steps is not None
        self._lone_calls = 0  # generations of one call, one after the other

    def judge(self, record: CacheRecord, finished: bool = False, so_far: bool = False) -> None:
        """Tell if a generation took nothing from the cache, though it should have.

        Args:
            record: Of the generation.
            finished: Its last scheduled step is over.
            so_far: It may go on, so that this is not the last word.
        """
        if record.judged or not record.steps:
            return
        lone = len(record.steps) == 1 and record.steps[0].index is None
        self._lone_calls = self._lone_calls + 1 if lone else 0
        caught = any(not step.full for step in record.steps)
        ends_early = not (finished or record.late) and (so_far or record.steps[-1].index is not None)
        why_not = why_nothing_cached(record, record.failed or ends_early) if self._wanted and not caught else None
        if lone and self._lone_calls < 2:
            return  # it may have been tried only
        if why_not is not None or caught:
            record.judged = caught or not so_far
            self._promise.judge(why_not)


def why_nothing_cached(record: CacheRecord, more_may_come: bool) -> str | None:
    """The reason and the mend; ``None`` if all steps were full by the configuration's own choice.

    Args:
        record: Of a generation all of whose steps were full.
        more_may_come: True if it may go on, or has failed before it had begun in earnest.
    """
    if len(record.steps) == 1 and record.steps[0].index is None:  # else a schedule's last step, as of image to image
        return (
            "a generation of one step has nothing to take from another. If it had more, in a loop of your own, put "
            "that into `with generation(pipe):`"
        )
    reasons = Counter(step.reason for step in record.steps if step.reason is not None)
    if reasons[WhyFull.interval] or reasons[WhyFull.listed]:
        reasons.pop(WhyFull.same_noise_level, None)  # of Heun's and PNDM's second calls
    if len(record.steps) <= MOST_CALLS and more_may_come:
        for early in (WhyFull.nothing_kept, WhyFull.changed):
            reasons.pop(early, None)
    unasked = [reason for reason, _ in reasons.most_common() if reason not in ASKED_FOR]
    return MENDS[unasked[0]] if unasked else None
