"""Files that are there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from tomesd_plus.evaluation.errors import EvaluationError


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write under a temporary name beside ``path``, then rename, so that nobody ever sees half a file.

    Raises:
        OSError: The disk is full, or the like. Nothing is left behind, and what was at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a value that :func:`write_json` wrote; an EvaluationError if that cannot be."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {path}: {error}") from error


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written, where the whole file has come since."""
    for temporary in folder.glob(".*.tmp"):
        name = temporary.name[1:].rsplit(".", 2)[0]  # .NAME.PROCESS.tmp
        if (folder / name).exists():
            temporary.unlink(missing_ok=True)
