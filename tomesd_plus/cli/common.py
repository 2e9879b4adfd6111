"""What all commands do: load a model, show progress, and fail in one line."""

import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import diffusers
import torch
import transformers
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

from tomesd_plus.evaluation.errors import EvaluationError, first_line
from tomesd_plus.evaluation.generation.devices import DTYPES, local_device
from tomesd_plus.evaluation.generation.models import ModelError, load_model

T = TypeVar("T")
console = Console()


def load(model: str, device: str | None, dtype: str | None, safety_checker: bool = True) -> tuple[Any, str]:
    """A pipeline, and a few words on where it runs."""
    device = local_device(device)
    dtype = dtype or ("float32" if device == "cpu" else "float16")
    if dtype not in DTYPES:
        fail(f"unknown dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    usable(device)
    quiet()
    try:
        return load_model(
            model, device, DTYPES[dtype], safety_checker
        ), f"{device}, {dtype}, torch {torch.__version__}"
    except ModelError as error:
        fail(str(error))


def usable(device: str) -> torch.device:
    """The device, if a tensor can be made there; PyTorch has an error of another class for each way it cannot."""
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"device {device!r} cannot be used: {first_line(error)}")


def quiet() -> None:
    """Switch off the host libraries' bars and hints, which are not for a command's user."""
    warnings.simplefilter("ignore", FutureWarning)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def run(call: Callable[[], T]) -> T:
    """Call, and turn what the user can put right into one line."""
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
    """Make a folder, or fail before there is anything to lose."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "permission denied")
    except OSError as error:
        fail(f"cannot write to {folder}: {error.strerror}")


class RateColumn(ProgressColumn):
    """How many a second."""

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
