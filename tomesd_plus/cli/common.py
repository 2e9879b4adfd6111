"""What all commands do: load a model, show progress, and fail in one line.

Help and wrong options are answered at once: what takes long to import, commands import inside their functions.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tomesd_plus.evaluation.errors import EvaluationError, ModelError, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
console = Console()


def load(
    model: str, device: str | None, dtype: str | None, safety_checker: bool = True, scheduler: str | None = None
) -> tuple[Any, str]:
    """Load a pipeline; returns it with a short description of device, dtype and torch version."""
    quiet()
    import torch

    from tomesd_plus.evaluation.generation.devices import dtype_by_name, local_device
    from tomesd_plus.evaluation.generation.models import load_model

    where = usable(device)
    chosen = run(lambda: dtype_by_name(dtype, where))
    pipe = run(lambda: load_model(model, local_device(device), chosen, safety_checker, scheduler))
    return pipe, f"{local_device(device)}, {str(chosen).removeprefix('torch.')}, torch {torch.__version__}"


def usable(device: str | None) -> "torch.device":
    """The device asked for, or the best available; fails if it cannot be used."""
    from tomesd_plus.evaluation.generation.devices import usable_device

    return run(lambda: usable_device(device))


def quiet() -> None:
    """Switch off the host libraries' bars and hints, which are not for a command's user."""
    from tomesd_plus.evaluation.quiet import quiet_libraries

    quiet_libraries()


def run(call: Callable[[], T]) -> T:
    """Call, and end the command with one line after an error that the user can correct."""
    try:
        return call()
    except (EvaluationError, ModelError, ValueError) as error:  # ValueError: the host's own checks, of sizes and such
        fail(str(error))
    except OSError as error:
        at = f" {error.filename}" if error.filename else ""
        fail(f"cannot read or write{at}: {error.strerror or error}. What is finished is kept: run the command again")
    except RuntimeError as error:  # a GPU's has a class of its own, a CPU's has not
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        fail(
            f"out of memory: {first_line(error)}. Choose smaller batches, images or numbers (--dtype). "
            "What is finished is kept"
        )


def check_writable(folder: Path) -> None:
    """Create a folder, or fail before the work begins."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "permission denied")
    except OSError as error:
        fail(f"cannot write to {folder}: {error.strerror}")


class RateColumn(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


def progress_bar(unit: str = "steps") -> Progress:
    """A bar with rate and time left, on standard error."""
    return Progress(
        TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        RateColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip


def say(message: str) -> None:
    """A line on standard error."""
    print(f"tomesd-plus: {' '.join(message.split())}", file=sys.stderr)


def fail(message: str) -> NoReturn:
    """End the command with one line on standard error."""
    say(message)
    raise typer.Exit(2)
