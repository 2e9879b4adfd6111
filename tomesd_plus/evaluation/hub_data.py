"""Data sets from the Hugging Face hub, loaded by the library datasets."""

from collections.abc import Sequence
from typing import Any

from tomesd_plus.evaluation.errors import EvaluationError, optional_import


def load_data_set(name: str, split: str, content: str) -> Any:
    """Load one split of a data set by its hub id or folder.

    Args:
        name: Hub id or folder.
        split: Which split to load.
        content: What is read from it, for error messages.

    Raises:
        EvaluationError: The library datasets is not installed, or there is no such data set or split.
    """
    datasets = optional_import("datasets", f"{content} from the data set {name!r} (there is no such file or folder)")
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # no network, no such id, no such split: each library version has its own
        raise EvaluationError(f"cannot load the data set {name!r}, split {split!r}: {error}") from error


def choose_column(names: Sequence[str], wanted: str | None, source: Any, usual: Sequence[str]) -> str:
    """Choose the column asked for, else one with a usual name, else the only one; or raise an EvaluationError."""
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
