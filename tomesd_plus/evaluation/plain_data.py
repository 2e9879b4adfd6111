"""Plain data that a stranger may have written: bounded, and checked against dataclasses."""

import dataclasses
import json
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
MAX_VALUES = 100_000  # in YAML, aliases (``*name``) written out
TOO_MANY = f"its aliases stand for more than {MAX_VALUES} values"
MAX_BYTES = 2**28  # of a file; an evaluation of 30,000 prompts writes a few million


class _Loader(yaml.SafeLoader):
    """Safe YAML whose merge keys (``<<: *name``) do not multiply without end."""

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise ValueError(TOO_MANY)


def load_yaml(text: str) -> Any:
    """Parse YAML; a ValueError in one line if that fails, or if its aliases stand for a great many values."""
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, OverflowError, TypeError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(reason) from error
    count, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        waiting += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        count += 1
        if count + len(waiting) > MAX_VALUES:
            raise ValueError(TOO_MANY)
    return value


def load_json(text: str) -> Any:
    """Parse JSON; a ValueError if that fails, or if it holds NaN or infinity, which JSON has not."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_text(path: Path) -> str:
    """Read a file of reasonable size; an OSError or a ValueError if that fails."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")  # reading from a pipe would never end
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"it holds {size / 2**20:.0f} MiB, more than any such file of ours")
    return path.read_text(encoding="utf-8")


def checked(cls: type[T], entry: Any) -> T:
    """Make a dataclass of plain data whose names and types are those of its fields.

    Raises:
        TypeError: They are not; numbers that are not finite count as no numbers.

    Example:
        >>> from tomesd_plus.evaluation.items import Item
        >>> checked(Item, {"prompt_id": "000001", "prompt": "a cat", "seed": 0}).seed
        0
    """
    if not isinstance(entry, Mapping):
        raise TypeError(f"{cls.__name__} must be an object, not {_short(entry)}")
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in entry and not _fits(entry[field.name], hints[field.name]):
            raise TypeError(f"{cls.__name__}: {field.name} is {_short(entry[field.name])}")
    return cls(**entry)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(isinstance(k, str) and _fits(v, parts[1]) for k, v in value.items())
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple)) and all(_fits(each, parts[0]) for each in value)
    if hint in (int, float):
        return isinstance(value, hint | int) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint)


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (list, dict, str)) else repr(value)[:40]


def _refuse(name: str) -> None:
    raise ValueError(f"it holds {name}")
