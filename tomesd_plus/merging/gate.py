"""The gate: leaves merging off where it does not pay, by measuring the model's own blocks."""

import contextlib
import json
import math
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from tomesd_plus.host.clock import moment, seconds_between
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.generation import Level
from tomesd_plus.schedules import AdaptiveRatio
from tomesd_plus.version import __version__

REPEATS = 3
MAX_BYTES = 2**24  # of the file; a decision takes some 400
LEAST_GAIN = 1.02  # a smaller speed-up is within the noise of a short measurement


@dataclass(frozen=True)
class Decision:
    """What was measured for one kind of block.

    Args:
        untouched_ms: Time of the block on all tokens, milliseconds.
        merged_ms: Time with matching, merging and unmerging.
    """

    untouched_ms: float
    merged_ms: float

    @property
    def pays(self) -> bool:
        """True if merging is faster by more than such a measurement's noise."""
        return self.untouched_ms >= LEAST_GAIN * self.merged_ms

    def __str__(self) -> str:
        verdict = "pays" if self.pays else "does not pay"
        return f"merging {verdict} here ({self.merged_ms:.2f} ms, untouched {self.untouched_ms:.2f} ms)"


class Gate:
    """Measured decisions, kept on disk from one process to the next.

    Args:
        path: The file; ``tomesd_plus/gate.json`` in the user's cache folder by default.
        refresh: Measure anew, whatever the file says.
    """

    def __init__(self, path: str | Path | None = None, refresh: bool = False) -> None:
        self.path = Path(path) if path is not None else cache_folder() / "gate.json"
        self.decisions: dict[str, Decision] = {} if refresh else _read(self.path)

    def decide(
        self, key: str, device: torch.device, untouched: Callable[[], object], merged: Callable[[], object]
    ) -> Decision:
        """Look a decision up, or measure: both ways in turn, medians after a warm-up.

        Args:
            key: What the times depend on, apart from versions and machine, which are added here.
            device: Where the block runs.
            untouched, merged: Run it in one way and the other.
        """
        key = f"{key} {_machine(device)}"
        if key not in self.decisions:
            times: dict[Callable[[], object], list[float]] = {untouched: [], merged: []}
            for _ in range(1 + REPEATS):
                for run, measured in times.items():
                    measured.append(_milliseconds(device, run))
            medians = [statistics.median(measured[1:]) for measured in times.values()]
            self.decisions[key] = Decision(*medians)
            self._write()
        return self.decisions[key]

    def _write(self) -> None:
        """Replace the file at once; a folder that cannot be written to only costs the next process a measurement."""
        content = {key: asdict(decision) for key, decision in (_read(self.path) | self.decisions).items()}
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            try:
                os.replace(file.name, self.path)
            finally:
                Path(file.name).unlink(missing_ok=True)  # it is still there if that failed


def judged_removal(level: Level) -> int:
    """For which number of removed tokens a level is measured, so that a smooth schedule is not measured at each step.

    Ratios are rounded down, to eighths, and below that to powers of two; an adaptive one counts as its smallest, which
    pays least.
    """
    removed, tokens = level.removed, level.height * level.width
    if isinstance(level.ratio, AdaptiveRatio):
        removed = min(count for ratio in level.ratio.ratios if (count := min(int(ratio * tokens), removed)))
    eighths = 8 * removed // tokens
    return eighths * tokens // 8 if eighths else 1 << (removed.bit_length() - 1)


# What the time of a block does not depend on, or what stands in the key by itself.
_NOT_OF_TIME = ("ratio", "cached_ratio", "max_downsample", "gate", "seed", "plan_per", "plan_every", "blocks_per_run")


def kind_of_block(attention: Any, hidden_states: Tensor, level: Level, judged: int, config: ToMeConfig) -> str:
    """All that the time of a transformer block depends on, but for machine and versions; by its attention layer."""
    batch, _, channels = hidden_states.shape
    options = {name: value for name, value in asdict(config).items() if name not in _NOT_OF_TIME}
    options["full_steps"] = config.full_steps is not None  # what details are kept for takes time
    return (
        f"{channels} channels, {attention.heads} heads, {kernel_of(attention)}, "
        f"{level.height} × {level.width} tokens, batch {batch}, "
        f"{hidden_states.dtype}, {hidden_states.device.type}, {judged} removed, {options}"
    )


def kernel_of(attention: Any) -> str:
    """What computes an attention layer."""
    processor = attention.processor
    inner, backend = type(getattr(processor, "inner", processor)), getattr(processor, "_attention_backend", None)
    return inner.__name__ if backend is None else f"{inner.__name__} on {backend}"


def cache_folder() -> Path:
    """Where the package keeps what it has measured: ``$XDG_CACHE_HOME/tomesd_plus``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tomesd_plus"


def _read(path: Path) -> dict[str, Decision]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return {}
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {key: Decision(**times) for key, times in entries.items() if _are_times(times)}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # not there, or not what we have written
        return {}


def _are_times(times: Any) -> bool:
    """True for what a measurement gives; the file may be a stranger's."""
    return set(times) == {"untouched_ms", "merged_ms"} and all(
        type(value) in (int, float) and 0 <= value < math.inf for value in times.values()
    )


def _machine(device: torch.device) -> str:
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {torch.__version__}, {diffusers.__version__}, {__version__}"


def _milliseconds(device: torch.device, run: Callable[[], object]) -> float:
    start = moment(device)
    run()
    return 1000 * seconds_between(start, moment(device))
