"""Progress of long work: a bar for each thing that is done on a terminal, else lines for a job's log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import TaskID

from tomesd_plus.cli.common import progress_bar, say

if TYPE_CHECKING:
    from tomesd_plus.evaluation.experiment import OnProgress
    from tomesd_plus.evaluation.generation.sharding import Share

SECONDS = 30.0  # between two lines


@contextmanager
def shown_progress(share: "Share") -> "Iterator[OnProgress | None]":
    """What to call with progress; of processes that a launcher started the first alone shows it."""
    if share.index % share.launched:
        yield None
    elif sys.stderr.isatty():
        with _bars() as on_progress:
            yield on_progress
    else:
        yield _lines()


@contextmanager
def _bars() -> "Iterator[OnProgress]":
    tasks: dict[str, TaskID] = {}
    with progress_bar("") as progress:

        def on_progress(name: str, count: int, total: int) -> None:
            if name not in tasks:
                for task in tasks.values():
                    progress.update(task, visible=False)
                tasks[name] = progress.add_task(name[:24], total=total or None)
            progress.update(tasks[name], advance=count)

        yield on_progress


def _lines() -> "OnProgress":
    """A line when something is done, and every half minute until then."""
    done: dict[str, int] = {}
    started: dict[str, float] = {}
    last = time.monotonic()

    def on_progress(name: str, count: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        started.setdefault(name, now)
        done[name] = done.get(name, 0) + count
        if done[name] != total and now - last < SECONDS:
            return
        last = now
        line = f"{name}: {done[name]}" + (f" of {total}" if total else "")
        if (seconds := now - started[name]) > 1:
            rate = done[name] / seconds
            line += f", {rate:.3g}/s" + (f", {max(0, total - done[name]) / rate:.0f} s left" if total else "")
        say(line)

    return on_progress
