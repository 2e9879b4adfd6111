"""The folder of an evaluation: an index of items and configurations, and a folder of images for each configuration."""

import io
import re
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
from tomesd_plus.evaluation.manifests import checked_manifest, make_manifest, manifest_under, refuse_another
from tomesd_plus.evaluation.plain_data import checked

INDEX = "experiment.json"
MANIFEST = "manifest.json"

OnProgress = Callable[[str, int, int], None]
"""Called with the name of the current task, the number of units just finished, and the total (0 if unknown)."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of one configuration: a PNG per item, or a text file with the reason why there is none."""

    path: Path

    def image(self, item: Item) -> Path:
        """Path of an item's image."""
        return self.path / f"{item.name}.png"

    def failure(self, item: Item) -> Path:
        """Path of the text file that says why an item has no image."""
        return self.path / f"{item.name}.failed"

    def is_done(self, item: Item) -> bool:
        """True if the item has an image or has failed."""
        return self.image(item).exists() or self.failure(item).exists()

    def save(self, item: Item, pixels: Tensor, withheld: bool = False) -> bool:
        """Write an item's image, (3, height, width) in [0, 1]; or, if it is unusable, the reason, and return False."""
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
        """The record of how the images were generated."""
        return checked_manifest(read_json(self.path / MANIFEST), self.path / MANIFEST)


@dataclass(frozen=True)
class Experiment:
    """The items and configurations of an evaluation.

    Args:
        out: The evaluation's folder.
        items: The images to generate with each configuration.
        prompts: Source of the prompts.
        skipped_prompts: Number of empty prompts, which are skipped.
        configurations: Names of the configurations' folders, in order.
    """

    out: Path
    items: tuple[Item, ...]
    prompts: str
    skipped_prompts: int = 0
    configurations: tuple[str, ...] = ()

    @classmethod
    def load(cls, out: Path) -> "Experiment":
        """Read the index that :meth:`prepare` wrote; an EvaluationError if there is none.

        Configurations whose folders have been deleted are left out.
        """
        if not (out / INDEX).exists():
            raise EvaluationError(f"{out} holds no evaluation (no {INDEX}): generate one first")
        index = read_json(out / INDEX)
        try:
            items = tuple(checked(Item, item) for item in index.pop("items"))
            names = tuple(map(_plain_name, index.pop("configurations")))
            folders = tuple(name for name in names if (out / name / MANIFEST).exists())
            return checked(cls, {"out": out, "items": items, "configurations": folders, **index})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise EvaluationError(f"{out / INDEX} is not an evaluation's: {error}") from error

    def prepare(
        self,
        configurations: Sequence[Configuration],
        conditions: dict[str, Any],
        batch: dict[str, int] | None = None,
    ) -> "Experiment":
        """Create or check the folder of each configuration and write the index.

        Args:
            configurations: What to generate; configurations that are already in the folder are kept.
            conditions: Model, sampling, scheduler, dtype, device and versions: what else determines the images.
            batch: How items are split into batches; recorded for configurations whose images depend on it.

        Raises:
            EvaluationError: A folder was made with another configuration, other prompts or other seeds; or a
                configuration's images depend on measured times. Nothing has been written then.

        Returns:
            The experiment with the configurations of this call and those that were there.
        """
        experiment = replace(self, configurations=tuple(configuration.folder for configuration in configurations))
        if (self.out / INDEX).exists():
            experiment = experiment._merged_with(Experiment.load(self.out))
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
        return experiment._write_index()

    def _write_index(self) -> "Experiment":
        """Write the index and include what other processes have written to it meanwhile."""
        experiment = self
        while True:
            if (self.out / INDEX).exists():
                experiment = experiment._merged_with(Experiment.load(self.out))
                if read_json(self.out / INDEX) == experiment._index():
                    return experiment
            write_json(self.out / INDEX, experiment._index())

    def _index(self) -> dict[str, Any]:
        return {key: value for key, value in plain(asdict(self)).items() if key != "out"}

    def folder(self, configuration: str | Configuration) -> ImageFolder:
        """The folder of a configuration."""
        name = configuration if isinstance(configuration, str) else configuration.folder
        return ImageFolder(self.out / name)

    def missing(self) -> dict[str, int]:
        """The number of items still to be generated, for each configuration that has any."""
        counts = {}
        for name in self.configurations:
            done = {path.stem for path in (self.out / name).iterdir() if path.suffix in (".png", ".failed")}
            counts[name] = sum(item.name not in done for item in self.items)
        return {name: count for name, count in counts.items() if count}

    @property
    def baseline(self) -> ImageFolder:
        """The folder of the unmodified pipeline's images; an EvaluationError if there is none."""
        if BASELINE.folder not in self.configurations:
            raise EvaluationError(f"{self.out} has no images of the baseline: run the generate pass again")
        return self.folder(BASELINE)

    def _merged_with(self, old: "Experiment") -> "Experiment":
        """Combine the configurations of both and take the longer list of items, which must start with the shorter."""
        shared = min(len(self.items), len(old.items))
        if self.items[:shared] != old.items[:shared]:
            raise EvaluationError(
                f"{self.out} was made with other prompts or seeds: choose another folder, or delete this one"
            )
        longer = self if len(self.items) >= len(old.items) else old
        names = dict.fromkeys([*old.configurations, *self.configurations])
        # the baseline comes first, even if its folder was deleted and generated again
        return replace(longer, configurations=tuple(sorted(names, key=lambda name: name != BASELINE.folder)))


def _plain_name(name: Any) -> str:
    """A folder's name in an index; nothing that leads out of the evaluation's folder."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{name!r} is no configuration's folder")
    return name
