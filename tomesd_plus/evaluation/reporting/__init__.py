"""The third pass: write tables and plots."""

from tomesd_plus.evaluation.reporting.comparison_plot import comparison_figure
from tomesd_plus.evaluation.reporting.overlays import difference, merge_map_overlay
from tomesd_plus.evaluation.reporting.report import joined, write_report

__all__ = ["comparison_figure", "difference", "joined", "merge_map_overlay", "write_report"]
