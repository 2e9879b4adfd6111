"""Manifests: how a configuration's images were made, and whether two of them are the same."""

from pathlib import Path
from typing import Any

from tomesd_plus.evaluation.configurations import Configuration
from tomesd_plus.evaluation.errors import EvaluationError


def make_manifest(
    configuration: Configuration, conditions: dict[str, Any], batch: dict[str, int] | None
) -> dict[str, Any]:
    """How the images of a configuration are made."""
    if configuration.by_time:
        raise EvaluationError(
            f"{configuration.name}: levels are chosen by measured times, so that no two runs need give the same "
            "pictures: name the levels instead, by max_downsample"
        )
    made_by: dict[str, Any] = {
        "name": configuration.name, "switches": configuration.resolved, "steps": configuration.steps,
        "seed_offset": configuration.seed_offset,
    }  # fmt: skip
    if configuration.by_batch and batch:
        made_by["batch"] = batch
    return manifest_under(conditions, made_by)


def manifest_under(conditions: dict[str, Any], made_by: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a configuration under these conditions."""
    sampling = {**conditions["sampling"], "steps": made_by.get("steps") or conditions["sampling"]["steps"]}
    return {**conditions, "sampling": sampling, "configuration": made_by}


def refuse_another(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise an EvaluationError that names the differences, if the images of a folder were made in another way."""
    old, new = _flat(old), _flat(new)
    differences = [
        f"{key} was {old.get(key)!r}, is now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differences:
        raise EvaluationError(
            f"{folder} was made with another configuration: {'; '.join(differences[:3])}. "
            "Choose another folder, or delete this one"
        )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flat(entry, f"{prefix}{key}.") if isinstance(entry, dict) else {f"{prefix}{key}": entry}
    return flat
