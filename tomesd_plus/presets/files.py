"""Presets in JSON: what is read is data only, and bounded; every value goes through its own class's checks."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

from tomesd_plus.caching import FeatureCacheConfig
from tomesd_plus.merging.config import FullSteps, ToMeConfig
from tomesd_plus.schedules import (
    AdaptiveRatio,
    ConstantSchedule,
    CosineSchedule,
    IntervalSchedule,
    LinearSchedule,
    StepPlan,
    StepsSchedule,
)

FORMAT = "tomesd_plus preset"
VERSION = 1
MOST_BYTES = 1_000_000
MOST_ITEMS = 2000  # of a list or object
DEEPEST = 8
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        FeatureCacheConfig,
        ToMeConfig,
        FullSteps,
        StepPlan,
        IntervalSchedule,
        AdaptiveRatio,
        ConstantSchedule,
        CosineSchedule,
        LinearSchedule,
        StepsSchedule,
    )
}


def encoded(value: Any) -> Any:
    """A dataclass as what JSON can hold: an object with its class's name as its kind."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__} | {
            each.name: encoded(getattr(value, each.name)) for each in fields(value)
        }
    if isinstance(value, Mapping):
        return {"kind": "mapping", "entries": [[encoded(key), encoded(each)] for key, each in value.items()]}
    if isinstance(value, (tuple, list)):
        return [encoded(each) for each in value]
    return value


def decoded(data: Any, kinds: dict[str, type[Any]], where: str, depth: int = 0) -> Any:
    """The opposite of :func:`encoded`.

    Args:
        data: As ``json.loads`` gives it.
        kinds: Classes by name, beside :data:`KINDS`.
        where: Stands before what an error says.
        depth: Of the data around it.

    Raises:
        ValueError: A kind or a key is unknown, or a value is refused by its class.
    """
    if depth > DEEPEST or (isinstance(data, (dict, list)) and len(data) > MOST_ITEMS):
        raise ValueError(f"{where} is nested deeper or longer than a preset can be")
    if isinstance(data, list):
        return tuple(decoded(each, kinds, where, depth + 1) for each in data)
    if not isinstance(data, dict):
        return data
    known = KINDS | kinds
    kind = data.get("kind")
    if kind == "mapping":
        return _mapping(data, kinds, where, depth)
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{where}: unknown kind {str(kind)[:100]!r}, expected one of {', '.join(known)}")
    names = {each.name for each in fields(known[kind])}
    unknown = [str(key)[:100] for key in data if key not in names | {"kind"}]
    if unknown:
        raise ValueError(f"{where}: {kind} has no {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    values = {key: decoded(each, kinds, where, depth + 1) for key, each in data.items() if key != "kind"}
    try:
        return known[kind](**values)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where}: {kind}: {error}") from error


def _mapping(data: dict[str, Any], kinds: dict[str, type[Any]], where: str, depth: int) -> dict[Any, Any]:
    entries = data.get("entries")
    if set(data) != {"kind", "entries"} or not isinstance(entries, list) or len(entries) > MOST_ITEMS:
        raise ValueError(f"{where}: a mapping must have a list of entries, and nothing else")
    made = {}
    for entry in entries:
        pair = decoded(entry, kinds, where, depth + 1)
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], (str, int)):
            raise ValueError(f"{where}: an entry of a mapping must be a pair of a name or number and its value")
        made[pair[0]] = pair[1]
    return made


def written(data: Any) -> str:
    """A preset's data as JSON, with format and version."""
    text = json.dumps({"format": FORMAT, "version": VERSION, "preset": data}, indent=1, allow_nan=False)
    return text + "\n"


def read(text: str | bytes, where: str) -> Any:
    """The opposite of :func:`written`.

    Args:
        text: A stranger's, at most :data:`MOST_BYTES` long.
        where: Stands before what an error says.

    Raises:
        ValueError: It is too long, no JSON, or of another format or version.
    """
    if not isinstance(text, (str, bytes)):
        raise ValueError(f"{where} must be JSON text, not {type(text).__name__}")
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > MOST_BYTES:
        raise ValueError(f"{where} is larger than a preset can be ({MOST_BYTES:,} bytes)")

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no preset: it cannot be read as JSON ({str(error)[:200]})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'{where} is no preset: it does not say "format": "{FORMAT}"')
    if data.get("version") != VERSION or isinstance(data["version"], bool):
        raise ValueError(
            f"{where} is a preset of version {str(data.get('version'))[:20]}, and this package reads {VERSION}: make "
            "it anew with tune, or update the package"
        )
    unknown = sorted(str(key)[:100] for key in set(data) - {"format", "version", "preset"})
    if unknown or "preset" not in data:
        raise ValueError(f"{where} is no preset: it has {', '.join(unknown) or 'no preset in it'}")
    return data["preset"]
