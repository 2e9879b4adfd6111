"""Reference images for distances: a folder, a data set, or saved statistics."""

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.file_io import files_digest
from tomesd_plus.evaluation.folders import list_pictures
from tomesd_plus.evaluation.images import Images
from tomesd_plus.evaluation.names import EMBEDDED
from tomesd_plus.evaluation.scoring.extractors import distance_device, extract
from tomesd_plus.evaluation.words import in_words, printable
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
        skipped: Number of files and images that were left out, by reason.
        device: Where distances are computed.
    """

    source: str
    statistics: Statistics
    features: Features | None
    skipped: dict[str, int] = field(default_factory=dict)
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
        left_out = f" Left out: {in_words(images.skipped)}." if images.skipped else ""
        raise EvaluationError(
            f"{printable(source)} has {len(kept)} readable images; a distance needs at least 2.{left_out}"
        )
    device = distance_device(extractor)
    return Reference(source, Statistics.of(features, device=device), features, images.skipped, device)


def save_reference(
    source: str,
    extractor: Extractor,
    path: Path,
    split: str = "validation",
    column: str | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Reference:
    """Save all that is known of a reference as ``.npz``; arguments as for loading.

    Returns:
        The saved reference, without its features.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        reference = load_reference(source, extractor, Path(folder) / "features.npy", split, column, on_images)
        new = Path(folder) / path.name
        more = {} if reference.features is None else {"features": np.asarray(reference.features)}
        if reference.skipped:
            more["skipped"] = np.array(json.dumps(reference.skipped))
        save_statistics(reference.statistics, new, extractor=np.array(extractor.name), **more)
        new.replace(path)
        return replace(reference, features=None)  # their file was temporary


def load_statistics(path: Path) -> Statistics:
    """Read a ``.npz`` file with the arrays ``mu`` and ``sigma``, as pytorch-fid writes it."""
    with np.load(path, allow_pickle=False) as file:
        if missing := {"mu", "sigma"} - set(file.files):
            raise ValueError(f"{path} has no {' and '.join(sorted(missing))}: not a file of statistics")
        mean, covariance = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{path}: mu or sigma holds NaN or infinity")
        count = file["count"] if "count" in file.files else None
        if count is not None and (count.shape != () or count.dtype.kind not in "iu" or count < 1):
            raise ValueError(f"{path}: count must be one whole number of at least 1")
        return Statistics(mean, covariance, None if count is None else int(count))


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
        return files_digest(list_pictures(path).paths)
    return f"{split}, {column}" if column else split


def _load_statistics(path: Path, extractor: Extractor, source: str) -> Reference:
    try:
        _check_size(path)
        statistics = load_statistics(path)
        with np.load(path, allow_pickle=False) as arrays:
            features = arrays["features"] if "features" in arrays.files else None
            made_with = str(arrays["extractor"]) if "extractor" in arrays.files else extractor.name
            skipped = _skipped(str(arrays["skipped"])) if "skipped" in arrays.files else {}
        if features is not None:
            _check_features(features, len(statistics.mean))
    except Exception as error:  # a stranger's file: archive, headers and arrays raise anything
        raise EvaluationError(f"cannot read statistics from {printable(path)}: {error}") from error
    if len(statistics.mean) != extractor.dimensions:
        raise EvaluationError(
            f"{path} holds statistics of {len(statistics.mean)} dimensions, but {extractor.name} has "
            f"{extractor.dimensions}: they were made with another network"
        )
    if made_with != extractor.name:
        raise EvaluationError(f"{path} holds statistics by {made_with}, but the images' are by {extractor.name}")
    device = distance_device(extractor)
    return Reference(source, statistics.to(device), features, skipped, device)


def _check_size(path: Path) -> None:
    """Refuse arrays that do not fit into the memory: an archive of a few bytes can hold gigabytes of zeros."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > psutil.virtual_memory().available:
        raise ValueError(f"its arrays take {size / 2**30:.0f} GiB, more than there is memory")


def _check_features(features: np.ndarray, dimensions: int) -> None:
    if features.dtype.kind != "f" or features.ndim != 2 or features.shape[1] != dimensions or len(features) < 2:
        raise ValueError(f"features must be floats (2 or more, {dimensions}), not {features.dtype} {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("its features hold NaN or infinity")


def _skipped(text: str) -> dict[str, int]:
    entries = json.loads(text)
    if not isinstance(entries, dict) or not all(type(count) is int for count in entries.values()):
        raise ValueError("what was skipped must be numbers by reason")
    return {printable(reason): count for reason, count in entries.items()}
