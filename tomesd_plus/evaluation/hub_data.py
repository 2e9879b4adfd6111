"""Data sets from the hub, read by the library datasets."""

from collections.abc import Sequence
from typing import Any

from tomesd_plus.evaluation.errors import EvaluationError, optional_import


def load_data_set(name: str, split: str, content: str) -> Any:
    """Load one split of a data set by its hub id or folder.

    Args:
        name: The id.
        split: Of the data set.
        content: What is wanted of it, for error messages.

    Raises:
        EvaluationError: The library datasets is not installed, or there is no such data set or split.
    """
    datasets = optional_import("datasets", f"{content} from the data set {name!r} (there is no such file or folder)")
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # no network, no such id, no such split: each library version has its own
        raise EvaluationError(f"cannot load the data set {name!r}, split {split!r}: {error}") from error


def choose_column(names: Sequence[str], wanted: str | None, source: Any, usual: Sequence[str]) -> str:
    """The column wanted, or else a usual one, or the only one; an EvaluationError with the names if there is none."""
    if wanted is not None and wanted in names:
        return wanted
    if wanted is None:
        by_lower = {name.lower(): name for name in names}
        for name in usual:
            if name in by_lower:
                return by_lower[name]
        if len(names) == 1:
            return names[0]
    raise EvaluationError(f"{source}: choose a column with --column; there are {', '.join(map(repr, names))}")
