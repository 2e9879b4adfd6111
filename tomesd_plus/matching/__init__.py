"""Which tokens merge into which, and how: pure functions of tensors, for any host."""

from tomesd_plus.matching.cells import Cells, make_cells, max_removed
from tomesd_plus.matching.plan import MergeMode, MergePlan
from tomesd_plus.matching.selection import keep_attended, keep_sampled, sample, significance
from tomesd_plus.matching.sequence import SequencePlan, merge_alternating, most_pairs, similarities
from tomesd_plus.matching.similarity import match, merge_most_similar

__all__ = [
    "Cells",
    "MergeMode",
    "MergePlan",
    "SequencePlan",
    "keep_attended",
    "keep_sampled",
    "make_cells",
    "match",
    "max_removed",
    "merge_alternating",
    "merge_most_similar",
    "most_pairs",
    "sample",
    "significance",
    "similarities",
]
