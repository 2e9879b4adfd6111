"""What goes wrong in a way that its user can put right."""

import importlib
from importlib.util import find_spec
from typing import Any


class EvaluationError(Exception):
    """Something that the user can put right; the message is one line that says what, and how."""


class ModelError(Exception):
    """A model cannot be loaded; the message is one line that says which and why."""


def first_line(error: BaseException) -> str:
    """What an error says in one line, or its class where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def installed(module: str) -> bool:
    """True if a library can be imported."""
    return find_spec(module) is not None


def optional_import(module: str, purpose: str, package: str | None = None) -> Any:
    """Import a library that only some evaluations need; an EvaluationError says what it is for and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EvaluationError(f"{purpose} needs {module}: pip install {package or module}") from error
