"""The folder of an evaluation: what is to be generated, a folder of images for each configuration, how it was made."""

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tomesd_plus.evaluation.configurations import BASELINE, Configuration
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.file_io import atomic_write, plain, read_json, write_json
from tomesd_plus.evaluation.images import to_image
from tomesd_plus.evaluation.items import Item
from tomesd_plus.evaluation.manifests import make_manifest, manifest_under, refuse_another

INDEX = "experiment.json"
MANIFEST = "manifest.json"

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it came just now, and how much there is of it."""


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
        buffer = io.BytesIO()
        to_image(pixels).save(buffer, "PNG")
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

    def opened(
        self,
        configurations: Sequence[Configuration],
        conditions: dict[str, Any],
        batch: dict[str, int] | None = None,
    ) -> "Experiment":
        """Make or check the folder of each configuration and write the index; returns the experiment with both.

        Args:
            configurations: To generate; those that are in the folder already stay.
            conditions: What :func:`describe` says.
            batch: What tells batches apart; kept where a configuration decides by what is in them.

        Raises:
            EvaluationError: A folder was made with another configuration, or with other prompts or seeds; or measured
                times decide about the images of a configuration. Nothing has been written then.
        """
        experiment = replace(self, configurations=tuple(configuration.folder for configuration in configurations))
        if (self.out / INDEX).exists():
            experiment = experiment._joined(Experiment.load(self.out))
        manifests = {configuration.folder: make_manifest(configuration, conditions, batch)
                     for configuration in configurations}  # fmt: skip
        for name in experiment.configurations:
            if (self.out / name / MANIFEST).exists():
                old = experiment.folder(name).manifest
                new = manifests.pop(name) if name in manifests else manifest_under(conditions, old["configuration"])
                refuse_another(self.out / name, old, new)
        for name, manifest in manifests.items():
            (self.out / name).mkdir(parents=True, exist_ok=True)
            write_json(self.out / name / MANIFEST, manifest)
        return experiment._listed()

    def _listed(self) -> "Experiment":
        """Write the index, with what other processes put there meanwhile."""
        experiment = self
        while True:
            if (self.out / INDEX).exists():
                experiment = experiment._joined(Experiment.load(self.out))
                if read_json(self.out / INDEX) == experiment._index():
                    return experiment
            write_json(self.out / INDEX, experiment._index())

    def _index(self) -> dict[str, Any]:
        return {key: value for key, value in plain(asdict(self)).items() if key != "out"}

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

    @property
    def baseline(self) -> ImageFolder:
        """The images of the untouched pipeline; an EvaluationError if they are not there."""
        if BASELINE.folder not in self.configurations:
            raise EvaluationError(f"{self.out} has no images of the baseline: run the generate pass again")
        return self.folder(BASELINE)

    def _joined(self, old: "Experiment") -> "Experiment":
        """With all configurations of both, and the longer of two lists of items, one of which starts the other."""
        shared = min(len(self.items), len(old.items))
        if self.items[:shared] != old.items[:shared]:
            raise EvaluationError(
                f"{self.out} was made with other prompts or seeds: choose another folder, or delete this one"
            )
        longer = self if len(self.items) >= len(old.items) else old
        names = dict.fromkeys([*old.configurations, *self.configurations])
        # The baseline is first, whatever was deleted and made again
        return replace(longer, configurations=tuple(sorted(names, key=lambda name: name != BASELINE.folder)))
