"""Measure what merging does to speed and pictures. Uses only the package's public API."""

from tomesd_plus.evaluation.compare import Comparison, Row, compare, peers_of
from tomesd_plus.evaluation.configurations import Configuration, complete, load_configurations, parse_configuration
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.experiment import Experiment, describe
from tomesd_plus.evaluation.features import ClipFeatures, Extractor, InceptionFeatures, load_extractor
from tomesd_plus.evaluation.fidelity import PSNR_CEILING, psnr, ssim
from tomesd_plus.evaluation.figures import comparison_figure
from tomesd_plus.evaluation.generate import Generated, GeneratedBatch, Sampling, generate, generate_batch
from tomesd_plus.evaluation.generation import generate_experiment, generate_images
from tomesd_plus.evaluation.images import to_image
from tomesd_plus.evaluation.items import Item, Share, make_items
from tomesd_plus.evaluation.models import DTYPES, ModelError, load_model, local_device, usual_guidance
from tomesd_plus.evaluation.overlays import difference, merge_map_overlay
from tomesd_plus.evaluation.prompts import Prompts, load_prompts
from tomesd_plus.evaluation.reference import save_reference
from tomesd_plus.evaluation.report import joined, write_report
from tomesd_plus.evaluation.results import Result, as_markdown, load_results
from tomesd_plus.evaluation.score import Scoring, score
from tomesd_plus.evaluation.speed import Speed, device_name, equal_time_rows, measured_speeds, peak_memory

__all__ = [
    "DTYPES",
    "PSNR_CEILING",
    "ClipFeatures",
    "Comparison",
    "Configuration",
    "EvaluationError",
    "Experiment",
    "Extractor",
    "Generated",
    "GeneratedBatch",
    "InceptionFeatures",
    "Item",
    "ModelError",
    "Prompts",
    "Result",
    "Row",
    "Sampling",
    "Scoring",
    "Share",
    "Speed",
    "as_markdown",
    "compare",
    "comparison_figure",
    "complete",
    "describe",
    "device_name",
    "difference",
    "equal_time_rows",
    "generate",
    "generate_batch",
    "generate_experiment",
    "generate_images",
    "joined",
    "load_configurations",
    "load_extractor",
    "load_model",
    "load_prompts",
    "load_results",
    "local_device",
    "make_items",
    "measured_speeds",
    "merge_map_overlay",
    "parse_configuration",
    "peak_memory",
    "peers_of",
    "psnr",
    "save_reference",
    "score",
    "ssim",
    "to_image",
    "usual_guidance",
    "write_report",
]
