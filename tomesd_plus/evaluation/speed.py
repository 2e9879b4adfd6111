"""Speeds: measured times and memory of each configuration, and the file that stores them."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from tomesd_plus.evaluation.configurations import BASELINE
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.experiment import Experiment
from tomesd_plus.evaluation.file_io import read_json
from tomesd_plus.evaluation.plain_data import checked

SPEED_FILE = "speed.json"


@dataclass(frozen=True)
class Speed:
    """Time and memory of a configuration.

    Args:
        seconds: Time per image: of a batch, divided by the batch size; median over the runs.
        step_seconds: Time per denoising step of a batch: mean over the steps, median over the runs.
        speedup: The baseline's time divided by this configuration's, each pair run in turn; median over the pairs.
        speedup_low, speedup_high: Minimum and maximum over the pairs.
        runs: Number of timed runs.
        batch_size: Images per batch.
        memory_mib: Peak memory in MiB: allocated by PyTorch on a GPU, resident memory of the process on a CPU.
        removed: For each step, its noise level and the share of tokens removed at each downsample.
        device: Name of the device.
        manifest: Hash of the configuration's manifest.
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

    def __post_init__(self) -> None:
        for step in self.removed:  # a stranger may have written the file that they were read from
            shares = step.get("removed")
            if not isinstance(shares, dict) or not all(
                str(level).isdecimal() and type(share) in (int, float) for level, share in shares.items()
            ):
                raise TypeError("removed must hold a share of tokens for each level of each step")


def load_speeds(experiment: Experiment, runs: int = 0, batch_size: int | None = None) -> dict[str, Speed]:
    """Load the measured speeds that are still valid, by folder name.

    A speed is invalid if the folder's manifest has changed, or if batch size or device differ from the baseline's.

    Args:
        experiment: With prepared folders.
        runs: Minimum number of timed runs.
        batch_size: Required batch size; the baseline's by default.
    """
    path = experiment.out / SPEED_FILE
    if not path.exists():
        return {}
    try:
        speeds = {name: checked(Speed, entry) for name, entry in read_json(path).items()}
    except (TypeError, AttributeError) as error:
        raise EvaluationError(f"{path} is not of this version: delete it to measure speeds again") from error
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
    """A hash of a configuration's manifest."""
    manifest = json.dumps(experiment.folder(name).manifest, sort_keys=True)
    return hashlib.sha256(manifest.encode()).hexdigest()[:16]
