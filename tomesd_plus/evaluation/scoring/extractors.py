"""Load feature extractors and LPIPS by name, and run extractors over images on the disk."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tomesd_plus.evaluation.errors import EvaluationError, optional_import
from tomesd_plus.evaluation.images import Images
from tomesd_plus.evaluation.names import INCEPTION, TINY
from tomesd_plus.metrics.features import ClipFeatures, Extractor, InceptionFeatures
from tomesd_plus.metrics.fidelity import Metric, lpips_metric
from tomesd_plus.tiny import TINY_CLIP


def load_extractor(name: str, device: str | torch.device = "cpu", inception_weights: str | None = None) -> Extractor:
    """Load an extractor.

    Args:
        name: ``"inception"``, ``"tiny"`` for the embedded CLIP, or any CLIP model's hub id or folder.
        device: Where it runs.
        inception_weights: A file, for ``"inception"``.

    Raises:
        EvaluationError: Its weights or its library cannot be had.
    """
    if name == INCEPTION:
        return _load_inception(inception_weights, device)
    try:
        return ClipFeatures.load(TINY_CLIP, device, "tiny CLIP") if name == TINY else ClipFeatures.load(name, device)
    except Exception as error:  # whatever a stranger's files or a missing network make the loaders raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EvaluationError(f"cannot load the CLIP model {name!r}: {reason}") from error


def _load_inception(weights: str | None, device: str | torch.device) -> Extractor:
    if weights is not None and not Path(weights).is_file():
        raise EvaluationError(f"InceptionV3's weights: there is no file {weights}")
    optional_import("torch_fidelity.feature_extractor_inceptionv3", "features of InceptionV3", "torch-fidelity")
    try:
        return InceptionFeatures.load(weights, device)
    except Exception as error:  # no network, a broken file: whatever the download and the loader raise
        raise EvaluationError(
            f"cannot load InceptionV3's weights: {error}. Without a network, fetch torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth elsewhere and name the file with --inception-weights"
        ) from error


def distance_device(extractor: Extractor) -> torch.device:
    """Where distances over its features are computed: on its GPU, if that has float64 numbers, as NVIDIA's have."""
    device = torch.device(getattr(extractor, "device", "cpu"))
    return device if device.type == "cuda" else torch.device("cpu")


def load_lpips(device: str | torch.device = "cpu") -> Metric:
    """The learned distance LPIPS over AlexNet, of two pictures (3, height, width) in [0, 1]; 0 for equal ones.

    Raises:
        EvaluationError: torchvision is missing, or AlexNet's weights are not there and cannot be downloaded.
    """
    optional_import("torchvision", "LPIPS")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        network = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
    except Exception as error:  # whatever a download makes torch.hub raise
        raise EvaluationError(f"LPIPS: cannot load AlexNet's weights: {error}") from error
    return lpips_metric(network, device)


def extract(
    extractor: Extractor, images: Images, file: Path, on_images: Callable[[int], None] | None = None
) -> tuple[np.ndarray, list[int]]:
    """Extract the features of images onto the disk, so that memory does not grow with their number.

    Args:
        extractor: What makes features.
        images: Any number; those that cannot be read are left out.
        file: Where the features go, as ``.npy``.
        on_images: Called with the number of images done.

    Raises:
        OSError: The disk has no room for the features.

    Returns:
        Features (count, dimensions), float32, mapped from the disk, and the indices of their images.
    """
    shape = (len(images), extractor.dimensions)
    features = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):  # else a disk that is full would end the process without a word, later
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    kept: list[int] = []
    for indices, batch in images.batches(extractor.batch_size):
        features[len(kept) : len(kept) + len(indices)] = extractor.of_images(batch).numpy()
        kept += indices
        if on_images:
            on_images(len(indices))
    features.flush()
    return features[: len(kept)], kept
