"""Errors that a user can fix, and optional dependencies."""

import importlib
from importlib.util import find_spec
from typing import Any


class EvaluationError(Exception):
    """An error that the user can fix; the message says in one line what is wrong and what to do."""


class ModelError(Exception):
    """A model cannot be loaded; the message is one line that says which and why."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name if the message is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def installed(module: str) -> bool:
    """True if a module can be imported."""
    return find_spec(module) is not None


def optional_import(module: str, purpose: str, package: str | None = None) -> Any:
    """Import an optional dependency; if it is missing, an EvaluationError says what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EvaluationError(f"{purpose} needs {module}: pip install {package or module}") from error
