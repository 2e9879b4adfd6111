"""Manifests: the record of how the images in a folder were generated."""

from pathlib import Path
from typing import Any

from tomesd_plus.evaluation.configurations import Configuration
from tomesd_plus.evaluation.errors import EvaluationError

NoneType = type(None)
REQUIRED: dict[str, tuple[type, ...]] = {  # what tables say of each row
    "model": (str,), "dtype": (str,), "device": (str,), "versions": (dict,), "scheduler.class": (str,),
    "sampling.steps": (int,), "sampling.guidance_scale": (int, float),
    "sampling.height": (int, NoneType), "sampling.width": (int, NoneType),
    "configuration.name": (str,), "configuration.seed_offset": (int,),
}  # fmt: skip


def make_manifest(
    configuration: Configuration, conditions: dict[str, Any], batch: dict[str, int] | None
) -> dict[str, Any]:
    """Describe how the images of a configuration are generated; see ``Experiment.prepare`` for the arguments."""
    if configuration.depends_on_timing:
        raise EvaluationError(
            f"{configuration.name}: levels are chosen by measured times, so two runs may give different images: "
            "set max_downsample instead"
        )
    made_by: dict[str, Any] = {
        "name": configuration.name, "switches": configuration.resolved, "steps": configuration.steps,
        "seed_offset": configuration.seed_offset,
    }  # fmt: skip
    if configuration.depends_on_batch and batch:
        made_by["batch"] = batch
    return manifest_under(conditions, made_by)


def checked_manifest(value: Any, path: Path) -> dict[str, Any]:
    """A manifest that was read from a file; an EvaluationError if it is none."""
    for place, kinds in REQUIRED.items():
        found: Any = value
        for key in place.split("."):
            found = found.get(key, REQUIRED) if isinstance(found, dict) else REQUIRED
        if not isinstance(found, kinds) or isinstance(found, bool):
            raise EvaluationError(f"{path} is no evaluation's, by its {place}: delete the folder, and generate again")
    return value


def manifest_under(conditions: dict[str, Any], made_by: dict[str, Any]) -> dict[str, Any]:
    """Combine conditions and the description of a configuration."""
    sampling = {**conditions["sampling"], "steps": made_by.get("steps") or conditions["sampling"]["steps"]}
    return {**conditions, "sampling": sampling, "configuration": made_by}


def refuse_another(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise an EvaluationError that lists the differences between two manifests of a folder, if there are any."""
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
