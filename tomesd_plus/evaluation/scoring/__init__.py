"""The second pass: compute a table of metrics with intervals from folders of images."""

from tomesd_plus.evaluation.scoring.extractors import load_extractor, load_lpips
from tomesd_plus.evaluation.scoring.reference import save_reference
from tomesd_plus.evaluation.scoring.results import Result, load_results
from tomesd_plus.evaluation.scoring.score import Scoring, score
from tomesd_plus.evaluation.scoring.tables import as_markdown

__all__ = [
    "Result",
    "Scoring",
    "as_markdown",
    "load_extractor",
    "load_lpips",
    "load_results",
    "save_reference",
    "score",
]
