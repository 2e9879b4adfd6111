"""Reference images for distances: a folder, a data set, or saved statistics."""

import hashlib
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.file_io import files_digest
from tomesd_plus.evaluation.images import SUFFIXES, Images
from tomesd_plus.evaluation.names import EMBEDDED
from tomesd_plus.evaluation.scoring.extractors import distance_device, extract
from tomesd_plus.metrics.distances import Features, Kernel, Statistics, within
from tomesd_plus.metrics.features import Extractor
from tomesd_plus.tiny import TINY_REFERENCE


@dataclass
class Reference:
    """Statistics and features of the reference images.

    Args:
        source: Where the images come from.
        statistics: Mean and covariance of their features.
        features: The features, for kernel distances; ``None`` if a file has only statistics.
        unreadable: Number of unreadable images.
        device: Where distances are computed.
    """

    source: str
    statistics: Statistics
    features: Features | None
    unreadable: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    _within: dict[Kernel, float] = field(default_factory=dict)

    def within(self, kernel: Kernel) -> float:
        """The mean of the kernel over pairs of reference images, cached."""
        if kernel not in self._within and self.features is not None:
            self._within[kernel] = within(self.features, kernel, device=self.device).item()
        return self._within[kernel]


def load_reference(
    source: str,
    extractor: Extractor,
    file: Path,
    split: str = "validation",
    column: str | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Reference:
    """Load the reference for one extractor.

    Args:
        source: ``"embedded"`` for the embedded pipeline's reference (features by the embedded CLIP); a folder of
            images; a ``.npz`` file with ``mu`` and ``sigma`` as pytorch-fid writes it, and, for kernel distances,
            ``features`` as :func:`save_reference` adds them; or a data set's id.
        extractor: The extractor that is also used for the generated images.
        file: Where to write the features of images.
        split, column: Of a data set.
        on_images: Called with the number of images in each batch.

    Raises:
        EvaluationError: It cannot be read, or its features are by another extractor.
    """
    path = TINY_REFERENCE if source == EMBEDDED else Path(source)
    if path.suffix == ".npz":
        return _load_statistics(path, extractor, source)
    images = Images.of_folder(path) if path.is_dir() else Images.of_data_set(source, split, column)
    features, kept = extract(extractor, images, file, on_images)
    if len(kept) < 2:
        raise EvaluationError(f"{source} has {len(kept)} readable images; a distance needs at least 2")
    device = distance_device(extractor)
    return Reference(source, Statistics.of(features, device=device), features, len(images.unreadable), device)


def save_reference(
    source: str,
    extractor: Extractor,
    path: Path,
    split: str = "validation",
    column: str | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Reference:
    """Save a reference's statistics, features and extractor name as ``.npz``; arguments as for loading.

    Returns:
        The saved reference, without its features.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        reference = load_reference(source, extractor, Path(folder) / "features.npy", split, column, on_images)
        new = Path(folder) / path.name
        more = {} if reference.features is None else {"features": np.asarray(reference.features)}
        save_statistics(reference.statistics, new, extractor=np.array(extractor.name), **more)
        new.replace(path)
        return replace(reference, features=None)  # their file was temporary


def load_statistics(path: Path) -> Statistics:
    """Read a ``.npz`` file with the arrays ``mu`` and ``sigma``, as pytorch-fid writes it."""
    with np.load(path) as file:
        if missing := {"mu", "sigma"} - set(file.files):
            raise ValueError(f"{path} has no {' and '.join(sorted(missing))}: not a file of statistics")
        mean, covariance = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{path}: mu or sigma holds NaN or infinity")
        return Statistics(mean, covariance, int(file["count"]) if "count" in file.files else None)


def save_statistics(statistics: Statistics, path: Path, **more: np.ndarray) -> None:
    """Write a ``.npz`` file that pytorch-fid can read, with further arrays if given."""
    arrays: dict[str, Any] = {
        "mu": statistics.mean.cpu().numpy(),
        "sigma": statistics.covariance.cpu().numpy(),
        **more,
    }
    if statistics.count is not None:
        arrays["count"] = np.array(statistics.count)
    np.savez_compressed(path, **arrays)


def reference_version(source: str, split: str = "validation", column: str | None = None) -> str:
    """A text that changes when the images of a reference change, found without reading them."""
    path = TINY_REFERENCE if source == EMBEDDED else Path(source)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    if path.is_dir():
        return files_digest(sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES))
    return f"{split}, {column}" if column else split


def _load_statistics(path: Path, extractor: Extractor, source: str) -> Reference:
    try:
        statistics = load_statistics(path)
        with np.load(path) as arrays:
            features = arrays["features"] if "features" in arrays.files else None
            made_with = str(arrays["extractor"]) if "extractor" in arrays.files else extractor.name
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"cannot read statistics from {path}: {error}") from error
    if len(statistics.mean) != extractor.dimensions:
        raise EvaluationError(
            f"{path} holds statistics of {len(statistics.mean)} dimensions, but {extractor.name} has "
            f"{extractor.dimensions}: they were made with another network"
        )
    if made_with != extractor.name:
        raise EvaluationError(f"{path} holds statistics by {made_with}, but the images' are by {extractor.name}")
    device = distance_device(extractor)
    return Reference(source, statistics.to(device), features, device=device)
