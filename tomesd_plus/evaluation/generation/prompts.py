"""Read prompts from a file or a data set, or take the embedded ones.

The standard library reads CSV and JSON: pandas would save a few lines, but it is a large dependency, and by default it
turns prompts such as "NA" or "1" into other values.
"""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tomesd_plus.evaluation.errors import EvaluationError, optional_import
from tomesd_plus.evaluation.hub_data import choose_column, load_data_set
from tomesd_plus.evaluation.names import EMBEDDED
from tomesd_plus.evaluation.plain_data import load_json
from tomesd_plus.tiny import held_out_captions

ENCODING = "utf-8-sig"  # spreadsheets write a byte order mark
COLUMNS = ("prompt", "prompts", "caption", "captions", "text", "sentence")  # names in published lists


@dataclass(frozen=True)
class Prompts:
    """Prompts and their source.

    Args:
        source: The source as it was given.
        entries: (id, text) of each prompt; the id is its index in the source.
        skipped: Number of empty prompts, which are left out.
    """

    source: str
    entries: tuple[tuple[str, str], ...]
    skipped: int = 0


def load_prompts(
    source: str = EMBEDDED, column: str | None = None, split: str = "train", limit: int | None = None
) -> Prompts:
    """Load prompts.

    Args:
        source: ``"embedded"`` for the package's held-out captions; a file: ``.txt`` (one prompt per line), ``.tsv`` or
            ``.csv`` (with a header line), ``.json`` (a list of texts or objects, or COCO's annotations), ``.jsonl``,
            ``.parquet`` (needs pyarrow), any other as ``.txt``; or the id of a data set (needs datasets).
        column: The column or key with the prompts; by default one named prompt, caption, text or similar.
        split: Split of a data set.
        limit: Maximum number of prompts.

    Raises:
        EvaluationError: The source is missing or unreadable, has no such column, or has only empty prompts.
    """
    if source == EMBEDDED and column is not None:
        raise EvaluationError(f"the embedded prompts have no columns, so there is no {column!r}")
    if source == EMBEDDED:
        texts: Iterable[Any] = held_out_captions()
    elif Path(source).suffix.lower() in READERS or Path(source).is_file():
        texts = _from_file(Path(source), column)
    else:
        texts = _from_data_set(source, column, split)
    entries, skipped = [], 0
    for index, text in enumerate(texts):
        if isinstance(text, str) and text.strip():
            entries.append((f"{index:06}", text.strip()))
        else:
            skipped += 1
        if limit is not None and len(entries) == limit:
            break
    if not entries:
        raise EvaluationError(f"{source} has no prompt that is not empty")
    return Prompts(source, tuple(entries), skipped)


def _from_file(path: Path, column: str | None) -> Iterable[Any]:
    try:
        return READERS.get(path.suffix.lower(), _read_text)(path, column)
    except (OSError, ValueError, csv.Error) as error:  # invalid JSON and invalid UTF-8 raise ValueErrors
        reason = getattr(error, "strerror", None) or error
        raise EvaluationError(f"cannot read prompts from {path}: {reason}") from error


def _from_data_set(name: str, column: str | None, split: str) -> Iterable[Any]:
    data = load_data_set(name, split, "prompts")
    return data[choose_column(data.column_names, column, name, COLUMNS)]


def _read_text(path: Path, column: str | None) -> list[str]:
    if column is not None:
        raise ValueError(f"a text has no columns, so there is no {column!r}")
    return path.read_text(encoding=ENCODING).splitlines()


def _read_table(path: Path, column: str | None) -> list[Any]:
    tabs = path.suffix.lower() == ".tsv"
    with path.open(encoding=ENCODING, newline="") as file:
        # with tabs, quotes are literal: an unpaired one would otherwise swallow the following lines
        rows = csv.DictReader(
            file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        )
        name = choose_column(rows.fieldnames or (), column, path, COLUMNS)
        return [row[name] for row in rows]


def _read_json(path: Path, column: str | None) -> list[Any]:
    text = path.read_text(encoding=ENCODING)
    entries: Any
    if path.suffix.lower() == ".jsonl":
        entries = [load_json(line) for line in text.splitlines() if line.strip()]
    else:
        entries = load_json(text)
    if isinstance(entries, Mapping):
        entries = entries.get("annotations")  # COCO
    if not isinstance(entries, list):
        raise ValueError("expected a list of texts or of objects, or an object with 'annotations'")
    names = list(dict.fromkeys(key for entry in entries if isinstance(entry, Mapping) for key in entry))
    if not names and column is None:
        return entries
    name = choose_column(names, column, path, COLUMNS)
    return [entry.get(name) if isinstance(entry, Mapping) else entry for entry in entries]


def _read_parquet(path: Path, column: str | None) -> list[Any]:
    parquet = optional_import("pyarrow.parquet", f"reading {path}", "pyarrow")
    name = choose_column(parquet.read_schema(path).names, column, path, COLUMNS)
    return parquet.read_table(path, columns=[name])[name].to_pylist()


READERS = {
    ".txt": _read_text,
    ".tsv": _read_table,
    ".csv": _read_table,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}
