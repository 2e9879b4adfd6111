"""Speeds: what was measured of each configuration, as data and on the disk."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from tomesd_plus.evaluation.configurations import BASELINE
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.experiment import Experiment
from tomesd_plus.evaluation.file_io import read_json

SPEED_FILE = "speed.json"


@dataclass(frozen=True)
class Speed:
    """What a configuration costs.

    Args:
        seconds: Median time of an image: of a batch, divided by its size.
        step_seconds: Time of a denoising step, of a whole batch: the mean over the steps, the median over the runs.
        speedup: Median of the baseline's time divided by this one's, run one after the other.
        speedup_low, speedup_high: The least and the greatest of these.
        runs: How many.
        batch_size: Images at a time.
        memory_mib: Peak, MiB: what PyTorch allocated on a GPU, or the process's resident memory on a CPU.
        removed: At each step its noise level, and the share of tokens removed at each downsample.
        device: What it ran on.
        manifest: A hash of how the images are made.
    """

    seconds: float
    step_seconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    runs: int
    batch_size: int
    memory_mib: float
    removed: list[dict[str, Any]] = field(default_factory=list)
    device: str = ""
    manifest: str = ""


def load_speeds(experiment: Experiment, runs: int = 0, batch_size: int | None = None) -> dict[str, Speed]:
    """What was measured so far, by the configurations' folders, as far as it still holds.

    It does not where the folder is of other images by now, nor where the baseline's batch or device is another.

    Args:
        experiment: Its folders are open.
        runs: The fewest that count.
        batch_size: The only one that counts; whichever the baseline has by default.
    """
    path = experiment.out / SPEED_FILE
    if not path.exists():
        return {}
    try:
        speeds = {name: Speed(**entry) for name, entry in read_json(path).items()}
    except (TypeError, AttributeError) as error:
        raise EvaluationError(f"{path} is not of this version: delete it, and speeds are measured again") from error
    base = speeds.get(BASELINE.folder)
    return {
        name: speed
        for name, speed in speeds.items()
        if base is not None
        and (speed.batch_size, speed.device) == (batch_size or base.batch_size, base.device)
        and speed.runs >= runs
        and name in experiment.configurations
        and speed.manifest == manifest_digest(experiment, name)
    }


def manifest_digest(experiment: Experiment, name: str) -> str:
    """A hash of how a configuration's images are made."""
    manifest = json.dumps(experiment.folder(name).manifest, sort_keys=True)
    return hashlib.sha256(manifest.encode()).hexdigest()[:16]
