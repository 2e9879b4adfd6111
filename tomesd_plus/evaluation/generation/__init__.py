"""The first pass: generate and time the images of each configuration; also compare a few images in memory."""

from tomesd_plus.evaluation.generation.compare import Comparison, Row, compare, peers_of
from tomesd_plus.evaluation.generation.models import load_model
from tomesd_plus.evaluation.generation.prompts import load_prompts
from tomesd_plus.evaluation.generation.run import generate_experiment
from tomesd_plus.evaluation.generation.sampling import Sampling, generate, generate_batch
from tomesd_plus.evaluation.generation.sharding import Share

__all__ = [
    "Comparison",
    "Row",
    "Sampling",
    "Share",
    "compare",
    "generate",
    "generate_batch",
    "generate_experiment",
    "load_model",
    "load_prompts",
    "peers_of",
]
