"""Which tokens merge into which, and how: pure functions of tensors, for any host."""

from tomesd_plus.matching.cells import Cells, make_cells, max_removed
from tomesd_plus.matching.plan import MergeMode, MergePlan
from tomesd_plus.matching.similarity import match, merge_most_similar

__all__ = ["Cells", "MergeMode", "MergePlan", "make_cells", "match", "max_removed", "merge_most_similar"]
