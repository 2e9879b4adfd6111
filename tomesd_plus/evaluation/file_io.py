"""Atomic writes, JSON and hashes of files."""

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
from tomesd_plus.evaluation.plain_data import load_json, read_text
from tomesd_plus.evaluation.words import printable


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write to a temporary file in the same folder, then rename it, so that no process sees an incomplete file.

    The temporary name is random: processes in containers may have the same id, and machines may share a disk. Of names
    of files that are not UTF-8, escapes are written, which JSON reads back.

    Raises:
        OSError: For example, the disk is full. The temporary file is removed and ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{_writer()}.tmp")
    try:
        temporary.write_bytes(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _writer() -> str:
    return f"{platform.node().replace('.', '-')}-{secrets.token_hex(6)}"


def plain(value: Any) -> Any:
    """Convert a value to what JSON can hold: dataclasses to objects with their class name, other types to text.

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
    """Read a JSON file; an EvaluationError if it cannot be read."""
    try:
        return load_json(read_text(path))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {printable(path)}: {error}") from error


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove temporary files that a killed process left for these paths, if the final files exist.

    Pass only paths that no other process writes: its temporary files would look the same.
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
    """A hash of the names and sizes of files: a cheap test for replaced files."""
    return digest([[path.name, path.stat().st_size] for path in paths])


def digest(value: Any) -> str:
    """A hash of a JSON value, 16 hexadecimal characters."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
