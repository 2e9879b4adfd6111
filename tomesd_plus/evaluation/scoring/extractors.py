"""Load feature extractors and LPIPS by name; extract features to the disk."""

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
    """Load a feature extractor.

    Args:
        name: ``"inception"``, ``"tiny"`` for the embedded CLIP, or any CLIP model's hub id or folder.
        device: Where it runs.
        inception_weights: A file with InceptionV3's weights; by default they are downloaded.

    Raises:
        EvaluationError: Its weights or its library are not available.
    """
    if name == INCEPTION:
        return _load_inception(inception_weights, device)
    try:
        return ClipFeatures.load(TINY_CLIP, device, "tiny CLIP") if name == TINY else ClipFeatures.load(name, device)
    except Exception as error:  # loaders of unknown files raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EvaluationError(f"cannot load the CLIP model {name!r}: {reason}") from error


def _load_inception(weights: str | None, device: str | torch.device) -> Extractor:
    if weights is not None and not Path(weights).is_file():
        raise EvaluationError(f"InceptionV3's weights: there is no file {weights}")
    optional_import("torch_fidelity.feature_extractor_inceptionv3", "features of InceptionV3", "torch-fidelity")
    try:
        return InceptionFeatures.load(weights, device)
    except Exception as error:  # no network, a corrupt file: download and loader raise anything
        raise EvaluationError(
            f"cannot load InceptionV3's weights: {error}. Without a network, fetch torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth elsewhere and name the file with --inception-weights"
        ) from error


def distance_device(extractor: Extractor) -> torch.device:
    """The device for distances over an extractor's features: its own if that is CUDA, as others may lack float64."""
    device = torch.device(getattr(extractor, "device", "cpu"))
    return device if device.type == "cuda" else torch.device("cpu")


def load_lpips(device: str | torch.device = "cpu") -> Metric:
    """Load LPIPS with AlexNet, as a function of two images (3, height, width) in [0, 1]; 0 for equal ones.

    Raises:
        EvaluationError: torchvision is not installed, or AlexNet's weights cannot be downloaded.
    """
    optional_import("torchvision", "LPIPS")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        network = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
    except Exception as error:  # torch.hub raises anything when a download fails
        raise EvaluationError(f"LPIPS: cannot load AlexNet's weights: {error}") from error
    return lpips_metric(network, device)


def extract(
    extractor: Extractor, images: Images, file: Path, on_images: Callable[[int], None] | None = None
) -> tuple[np.ndarray, list[int]]:
    """Extract the features of images to a file, so that memory does not grow with the number of images.

    Args:
        extractor: The feature extractor.
        images: The images; unreadable ones are left out.
        file: The ``.npy`` file to write.
        on_images: Called with the number of images in each batch.

    Raises:
        OSError: There is not enough space on the disk.

    Returns:
        Memory-mapped float32 features (count, dimensions) and the indices of their images.
    """
    shape = (len(images), extractor.dimensions)
    features = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):  # with a full disk, a write to the mapped file would kill the process
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
