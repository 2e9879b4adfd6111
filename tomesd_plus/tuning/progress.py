"""A bar of the work that tuning has done, with the time left."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Bar:
    """A ``with`` block that shows a bar on standard error.

    Args:
        total: Work in untouched generations of all prompts.
        shown: False shows nothing.
    """

    def __init__(self, total: float, shown: bool) -> None:
        self._progress = Progress(
            TextColumn("tune"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"), console=Console(stderr=True), transient=True, disable=not shown,
        )  # fmt: skip
        self._task = self._progress.add_task("recording", total=total)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, amount: float, what: str) -> None:
        """More work was done: how much, and what for."""
        self._progress.update(self._task, advance=amount, description=what)
