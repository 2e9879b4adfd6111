"""Measure what merging does to speed and pictures. Uses only the package's public API."""

from tomesd_plus.evaluation.compare import Comparison, Row, Setting, compare, peer_settings
from tomesd_plus.evaluation.figures import comparison_figure
from tomesd_plus.evaluation.generate import Generated, Sampling, generate
from tomesd_plus.evaluation.models import ModelError, load_model

__all__ = [
    "Comparison",
    "Generated",
    "ModelError",
    "Row",
    "Sampling",
    "Setting",
    "compare",
    "comparison_figure",
    "generate",
    "load_model",
    "peer_settings",
]
