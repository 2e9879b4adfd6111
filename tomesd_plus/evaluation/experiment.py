"""The folder of an evaluation: what is to be generated, a folder of images for each configuration, how it was made."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tomesd_plus.evaluation.configurations import Configuration
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.files import atomic_write, read_json, write_json
from tomesd_plus.evaluation.generate import Sampling
from tomesd_plus.evaluation.items import Item

INDEX = "experiment.json"
MANIFEST = "manifest.json"
LIBRARIES = ("torch", "diffusers", "transformers", "tomesd-plus")


@dataclass(frozen=True)
class ImageFolder:
    """The images of one configuration, a PNG an item; a text file with the reason where an item gave none."""

    path: Path

    def image(self, item: Item) -> Path:
        """Where an item's image is, or will be."""
        return self.path / f"{item.name}.png"

    def failure(self, item: Item) -> Path:
        """Where it says why an item gave no image."""
        return self.path / f"{item.name}.failed"

    def is_done(self, item: Item) -> bool:
        """True if the item has its image, or will never have one."""
        return self.image(item).exists() or self.failure(item).exists()

    def save(self, item: Item, pixels: Tensor, withheld: bool = False) -> bool:
        """Write an item's image, (3, height, width) in [0, 1]; False if it is none and a reason was written."""
        if withheld or not pixels.isfinite().all():
            reason = (
                "withheld by the safety checker" if withheld else "not a number: the model overflows in this dtype"
            )
            atomic_write(self.failure(item), reason + "\n")
            return False
        array = pixels.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        atomic_write(self.image(item), buffer.getvalue())
        return True

    @property
    def manifest(self) -> dict[str, Any]:
        """How the images were made."""
        return dict(read_json(self.path / MANIFEST))


@dataclass(frozen=True)
class Experiment:
    """What an evaluation generates, in one folder.

    Args:
        out: The folder.
        items: Every prompt with every seed.
        prompts: Where the prompts come from.
        skipped_prompts: How many were left out because they are empty.
        configurations: Names of the configurations' folders, in order.
    """

    out: Path
    items: tuple[Item, ...]
    prompts: str
    skipped_prompts: int = 0
    configurations: tuple[str, ...] = ()

    @classmethod
    def load(cls, out: Path) -> "Experiment":
        """Read what :meth:`opened` wrote; an EvaluationError if the folder holds no experiment.

        A configuration whose folder was deleted since is no longer part of it.
        """
        if not (out / INDEX).exists():
            raise EvaluationError(f"{out} holds no evaluation (no {INDEX}): generate one first")
        index = read_json(out / INDEX)
        try:
            items = tuple(Item(**item) for item in index.pop("items"))
            folders = tuple(name for name in index.pop("configurations") if (out / name / MANIFEST).exists())
            return cls(out, items, configurations=folders, **index)
        except (KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(f"{out / INDEX} is not an evaluation's: {error}") from error

    def opened(self, configurations: Sequence[Configuration], conditions: dict[str, Any]) -> "Experiment":
        """Make or check the folder of each configuration and write the index; returns the experiment with both.

        Args:
            configurations: To generate; those that are in the folder already stay.
            conditions: What :func:`describe` says.

        Raises:
            EvaluationError: A folder was made with another configuration, or with other prompts or seeds. Nothing has
                been written then.
        """
        experiment = replace(self, configurations=tuple(configuration.folder for configuration in configurations))
        if (self.out / INDEX).exists():
            experiment = experiment._joined(Experiment.load(self.out))
        manifests = {}
        for configuration in configurations:
            path = self.out / configuration.folder / MANIFEST
            made_by = {"name": configuration.name, "switches": configuration.switches,
                       "seed_offset": configuration.seed_offset}  # fmt: skip
            manifest = json.loads(json.dumps({**conditions, "configuration": made_by}, default=str))
            manifest["sampling"]["steps"] = configuration.steps or manifest["sampling"]["steps"]
            if path.exists():
                _refuse_another(path.parent, read_json(path), manifest)
            else:
                manifests[path] = manifest
        for path, manifest in manifests.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, manifest)
        index = asdict(experiment)
        del index["out"]
        index = json.loads(json.dumps(index))
        if not (self.out / INDEX).exists() or read_json(self.out / INDEX) != index:
            write_json(self.out / INDEX, index)
        return experiment

    def folder(self, configuration: str | Configuration) -> ImageFolder:
        """The images of a configuration."""
        name = configuration if isinstance(configuration, str) else configuration.folder
        return ImageFolder(self.out / name)

    def missing(self) -> dict[str, int]:
        """How many items are yet to be generated, by configuration; only those where any is."""
        counts = {}
        for name in self.configurations:
            done = {path.stem for path in (self.out / name).iterdir() if path.suffix in (".png", ".failed")}
            counts[name] = sum(item.name not in done for item in self.items)
        return {name: count for name, count in counts.items() if count}

    def _joined(self, old: "Experiment") -> "Experiment":
        """With all configurations of both, and the longer of two lists of items, one of which starts the other."""
        shared = min(len(self.items), len(old.items))
        if self.items[:shared] != old.items[:shared]:
            raise EvaluationError(
                f"{self.out} was made with other prompts or seeds: choose another folder, or delete this one"
            )
        longer = self if len(self.items) >= len(old.items) else old
        return replace(longer, configurations=tuple(dict.fromkeys([*old.configurations, *self.configurations])))


def describe(pipe: Any, model: str, sampling: Sampling) -> dict[str, Any]:
    """Everything beside the configuration that decides about the pixels; ``pipe`` must be untouched.

    Args:
        pipe: A pipeline.
        model: What it was loaded from.
        sampling: Steps, guidance and size.
    """
    parameter = next(pipe.unet.parameters())
    size = getattr(pipe.unet.config, "sample_size", None)
    own = size * pipe.vae_scale_factor if isinstance(size, int) else None
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return {
        "model": model,
        "fingerprint": _fingerprint(pipe.unet),
        "sampling": {**asdict(sampling), "height": sampling.height or own, "width": sampling.width or own},
        "scheduler": {"class": type(pipe.scheduler).__name__, **scheduler},
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _fingerprint(unet: torch.nn.Module) -> float:
    """A number that other weights would not have: cheap, and the same on every device."""
    first = [tensor.flatten()[:16].detach().double().cpu() for tensor in unet.state_dict().values()]
    values = torch.cat(first).nan_to_num()
    return float(values @ torch.linspace(1, 2, len(values), dtype=torch.float64))


def _refuse_another(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
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
