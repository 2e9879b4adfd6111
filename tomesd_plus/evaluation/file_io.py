"""Files that are there whole or not at all."""

import hashlib
import json
import math
import platform
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tomesd_plus.evaluation.errors import EvaluationError


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write under a temporary name beside ``path``, then rename, so that nobody ever sees half a file.

    The temporary name is nobody else's: processes in containers may share a number, on machines a disk.

    Raises:
        OSError: The disk is full, or the like. Nothing is left behind, and what was at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.name}.{_writer()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _writer() -> str:
    return f"{platform.node().replace('.', '-')}-{secrets.token_hex(6)}"


def plain(value: Any) -> Any:
    """A value as JSON has it: objects with their class's name, and what JSON has no word for as text.

    Example:
        >>> from tomesd_plus import LinearSchedule
        >>> plain({1: LinearSchedule(0.5, 0.25), "least": -math.inf})
        {'1': {'class': 'LinearSchedule', 'noisy': 0.5, 'clean': 0.25}, 'least': '-inf'}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__, **{f.name: plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a value that :func:`write_json` wrote; an EvaluationError if that cannot be."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {path}: {error}") from error


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove what a killed process left half written of these files, where they are whole by now.

    Only of files that are this process's own to write: what another is writing just now looks the same.
    """
    by_folder: dict[Path, set[str]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, set()).add(path.name)
    for folder, names in by_folder.items():
        for temporary in folder.glob(".*.tmp"):
            name = temporary.name[1:].rsplit(".", 2)[0]  # .NAME.WRITER.tmp
            if name in names and (folder / name).exists():
                temporary.unlink(missing_ok=True)


def files_digest(paths: Iterable[Path]) -> str:
    """A hash of the names and sizes of files, which tells cheaply whether one was replaced."""
    return digest([[path.name, path.stat().st_size] for path in paths])


def digest(value: Any) -> str:
    """A hash of a JSON value, 16 characters."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
