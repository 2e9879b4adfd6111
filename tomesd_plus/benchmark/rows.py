"""The rows of the benchmark's table: computed from measured times, stored as CSV."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import torch

from tomesd_plus.benchmark.measure import Measured, Workload
from tomesd_plus.benchmark.settings import Setting
from tomesd_plus.benchmark.towers import TOWERS
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.file_io import atomic_write
from tomesd_plus.version import __version__


@dataclass(frozen=True)
class Row:
    """A setting on a workload. All values are text, so that a file is read as it was written; ``""`` is unknown.

    Args:
        shape, size, batch, dtype, mode, device: The workload and its device. Size in pixels; the batch includes both
            guidance branches; the mode is eager or compiled.
        setting, ratio, levels: See :class:`~tomesd_plus.benchmark.settings.Setting`; of a vision tower the method and
            r, without levels.
        step_ms, step_ms_low, step_ms_high: Time of a call, ms: median, minimum and maximum over the runs.
        speedup, speedup_low, speedup_high: The untouched UNet's time divided by this one's in the same round.
        efficiency: Share of the possible saving that is reached, see :func:`merge_efficiency`.
        matching_ms: Time per UNet call of drawing cells and finding plans, eager; on a GPU measured by events.
        merging_ms: The same for merging and unmerging.
        memory_mib: Peak memory: allocated by PyTorch on a GPU; on a CPU resident memory of the process, which includes
            what other settings keep between steps.
        psnr: dB, of the embedded pipeline's images against the untouched pipeline's with the same seeds.
        runs, calls: Timed runs, and UNet calls per run.
        tomesd_plus, torch, diffusers: Versions.
        date: Date of the measurement, UTC.
        note: Version of another package, or why there are no times.
    """

    shape: str
    size: str
    batch: str
    dtype: str
    mode: str
    device: str
    setting: str
    ratio: str
    levels: str
    tomesd_plus: str
    torch: str
    diffusers: str
    step_ms: str = ""
    step_ms_low: str = ""
    step_ms_high: str = ""
    speedup: str = ""
    speedup_low: str = ""
    speedup_high: str = ""
    efficiency: str = ""
    matching_ms: str = ""
    merging_ms: str = ""
    memory_mib: str = ""
    psnr: str = ""
    runs: str = ""
    calls: str = ""
    date: str = ""
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies a row: an existing row with the same key is not measured again."""
        return astuple(self)[:12]

    @property
    def workload(self) -> tuple[str, ...]:
        """Workload, device and versions: rows are compared with rows of the same."""
        return (*self.key[:6], *self.key[9:])

    @property
    def is_tower(self) -> bool:
        """True for a vision tower."""
        return self.shape in TOWERS

    @property
    def images_per_second(self) -> str:
        """Pictures in a second, of a vision tower's rows."""
        return _text(1000 * int(self.batch) / float(self.step_ms)) if self.is_tower and self.step_ms else ""

    @property
    def label(self) -> str:
        """Short name of setting, ratio and levels."""
        depth = f", {self.levels} levels" if self.levels not in ("", "1") else ""
        return f"{self.setting}{f', {self.ratio}' if self.ratio else ''}{depth}"


def blank_row(workload: Workload, setting: Setting, device: str) -> Row:
    """A row without measurements."""
    return Row(
        workload.shape, str(workload.size), str(workload.batch), workload.dtype, workload.mode, device, *setting.key,
        __version__, torch.__version__, diffusers.__version__,
    )  # fmt: skip


def make_rows(
    workload: Workload, measured: Sequence[Measured], device: str, psnr: dict[tuple[str, str, str], float]
) -> list[Row]:
    """Make the rows of settings that were measured together.

    Args:
        workload: The workload.
        measured: The measurements, the untouched UNet's first.
        device: Name of the device.
        psnr: PSNR in dB by setting key.
    """
    base, *_ = measured
    shares = {each.setting.key: _share(each, base) for each in measured if each.seconds}
    rows = []
    for each in measured:
        values: dict[str, str] = {"note": each.failure or each.setting.note}
        if each.seconds:
            speedups = [untouched / own for untouched, own in zip(base.seconds, each.seconds, strict=True)]
            ideal, efficiency = each.setting.ideal, None
            if ideal is not None and ideal.key in shares:
                efficiency = merge_efficiency(1.0, shares[each.setting.key], shares[ideal.key])
            values |= {
                "step_ms": _text(1000 * statistics.median(each.seconds)),
                "step_ms_low": _text(1000 * min(each.seconds)),
                "step_ms_high": _text(1000 * max(each.seconds)),
                "speedup": _text(statistics.median(speedups)),
                "speedup_low": _text(min(speedups)),
                "speedup_high": _text(max(speedups)),
                "efficiency": _text(efficiency, 3),
                "matching_ms": _text(None if each.matching_seconds is None else 1000 * each.matching_seconds),
                "merging_ms": _text(None if each.merging_seconds is None else 1000 * each.merging_seconds),
                "memory_mib": _text(each.memory_mib),
                "psnr": _text(psnr.get(each.setting.key)),
                "runs": str(len(each.seconds)),
                "calls": str(each.calls),
            }
        values["date"] = datetime.now(UTC).date().isoformat()
        rows.append(Row(**{**asdict(blank_row(workload, each.setting, device)), **values}))
    return rows


def merge_efficiency(base: float, merged: float, ideal: float) -> float | None:
    """Share of the possible saving that merging reaches: (base − merged) / (base − ideal).

    Args:
        base: Time of the untouched network.
        merged: Time with merging.
        ideal: Time if the merged layers run on fewer tokens without overhead.

    Returns:
        1 at best, below 0 if merging is slower than the untouched network; ``None`` if nothing can be saved.

    Example:
        >>> merge_efficiency(base=10.0, merged=8.5, ideal=8.0)
        0.75
    """
    return (base - merged) / (base - ideal) if base > ideal else None


def load_rows(path: Path) -> list[Row]:
    """Read a CSV file that :func:`save_rows` wrote; empty if there is no file.

    Raises:
        EvaluationError: It has another format.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [Row(**line) for line in csv.DictReader(file)]
    except (OSError, TypeError, ValueError) as error:
        raise EvaluationError(f"{path} is not this benchmark's: {error}") from error


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows to a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [each.name for each in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    atomic_write(path, text.getvalue())


def _share(measured: Measured, base: Measured) -> float:
    """The time as a share of the untouched UNet's: the median over pairs of the same round."""
    return statistics.median(own / untouched for own, untouched in zip(measured.seconds, base.seconds, strict=True))


def _text(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
