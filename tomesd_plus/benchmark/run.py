"""Run a suite: measure the missing rows of its table, workload by workload, until the time limit."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tomesd_plus.benchmark.fidelity import embedded_psnr
from tomesd_plus.benchmark.measure import Protocol, measure
from tomesd_plus.benchmark.report import save_report
from tomesd_plus.benchmark.rows import Row, blank_row, load_rows, make_rows, save_rows
from tomesd_plus.benchmark.settings import UNTOUCHED, Setting
from tomesd_plus.benchmark.shapes import SHAPES
from tomesd_plus.benchmark.suites import Suite
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.generation.devices import device_name

FIDELITY = "fidelity.json"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a benchmark.

    Args:
        rows: The whole table, including rows of earlier runs.
        files: The files written.
        unfinished: Workloads that were not measured before the time limit.
        left_out: Reasons why settings were not measured, without duplicates.
    """

    rows: list[Row]
    files: list[Path]
    unfinished: list[str]
    left_out: list[str]


def run_suite(
    suite: Suite, device: torch.device, out: Path, name: str, on_progress: Callable[[str, str], None] | None = None
) -> Outcome:
    """Measure the rows that ``NAME.csv`` lacks, and write it and a report of all rows.

    The file is written after each workload, so an interrupted run loses at most one; run it again to continue. Rows of
    the same versions and device are not measured again.

    Args:
        suite: What to measure, how, and for how long.
        device: Where to run.
        out: An existing folder.
        name: Name of the files.
        on_progress: Called with the current workload and setting before each run.
    """
    deadline = time.monotonic() + 60 * suite.minutes if suite.minutes is not None else float("inf")
    suite_protocol = Protocol(suite.repeats, suite.run_seconds, deadline)
    progress = on_progress or (lambda what, setting: None)
    path, where = out / f"{name}.csv", device_name(device)
    rows = [row for row in load_rows(path) if row.step_ms]  # failures are measured again
    available, left_out = _available(list({s.key: s for task in suite.tasks for s in task.settings}.values()))
    psnr = embedded_psnr(
        available, out / FIDELITY, device, suite.prompts, suite.steps, lambda setting: progress("fidelity", setting)
    )
    unfinished = []
    for task in suite.tasks:
        known = {row.key for row in rows}
        settings = [setting for setting in task.settings if setting in available]
        missing = [setting for setting in settings if blank_row(task.workload, setting, where).key not in known]
        if not missing:
            continue
        ideals = [setting.ideal for setting in missing]
        needed = [each for each in settings if each in missing or each == UNTOUCHED or each in ideals]

        def before_run(setting: str, what: str = str(task.workload)) -> None:
            progress(what, setting)

        protocol = replace(suite_protocol, repeats=min(task.repeats or suite.repeats, suite.repeats))
        measured = [] if protocol.is_over else measure(task.workload, needed, device, protocol, before_run)
        if not measured:
            unfinished.append(str(task.workload))
            continue
        shape = SHAPES.get(task.workload.shape)
        of_unet = psnr if shape is not None and not shape.is_transformer else {}  # the embedded pipeline has a UNet
        rows += [row for row in make_rows(task.workload, measured, where, of_unet) if row.key not in known]
        save_rows(rows, path)
    files = [path, *save_report(rows, out, name)] if rows else []
    return Outcome(rows, files, unfinished, left_out)


def _available(settings: Sequence[Setting]) -> tuple[list[Setting], list[str]]:
    """The settings whose packages are installed, and why the others are left out."""
    chosen, reasons = [], []
    for setting in settings:
        try:
            setting.check()
            chosen.append(setting)
        except EvaluationError as error:
            reasons.append(str(error))
    return chosen, list(dict.fromkeys(reasons))
