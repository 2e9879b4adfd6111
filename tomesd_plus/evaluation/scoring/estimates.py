"""Metrics with intervals, from the features of a configuration's images and from pairs of images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tomesd_plus.evaluation.images import Images
from tomesd_plus.evaluation.scoring.reference import Reference
from tomesd_plus.evaluation.words import in_words, printable
from tomesd_plus.metrics.distances import (
    Features,
    Kernel,
    Statistics,
    frechet_distance,
    gaussian_kernel,
    kernel_distance,
    polynomial_kernel,
)
from tomesd_plus.metrics.features import ClipFeatures, Extractor, InceptionFeatures, clip_scores
from tomesd_plus.metrics.fidelity import Metric
from tomesd_plus.metrics.intervals import Estimate, mean_estimate, resampling_weights


def distance_names(extractor: Extractor) -> dict[str, Kernel | None]:
    """The names of an extractor's distances, with their kernels; ``None`` for the Fréchet distance.

    Only distances over InceptionV3's features are called FID and KID; others name their extractor.
    """
    if isinstance(extractor, InceptionFeatures):
        return {"FID": None, "KID": polynomial_kernel}
    names: dict[str, Kernel | None] = {
        f"Fréchet distance ({extractor.name})": None,
        f"kernel distance ({extractor.name})": polynomial_kernel,
    }
    if isinstance(extractor, ClipFeatures):
        names[f"CMMD ({extractor.name})"] = gaussian_kernel
    return names


def distances(
    extractor: Extractor,
    features: Features,
    reference: Reference,
    resamples: int,
    on_resample: Callable[[int], None] | None = None,
) -> tuple[dict[str, Estimate], list[str]]:
    """All distances of generated images' features (count ≥ 2, dimensions) to a reference, and notes.

    They are computed on the reference's device; ``on_resample`` is called with 1 after each resample.
    """
    estimates, notes, resampled = {}, [], []
    count, dimensions = features.shape
    device = reference.device
    weights = resampling_weights(count, resamples)
    for name, kernel in distance_names(extractor).items():
        if kernel is None:
            for row in weights:  # with 2,048 dimensions each takes seconds
                resampled.append(frechet_distance(reference.statistics, Statistics.of(features, row, device)))
                if on_resample:
                    on_resample(1)
            value = frechet_distance(reference.statistics, Statistics.of(features, device=device))
            estimates[name] = Estimate.of(value, torch.tensor(resampled), count)
        elif reference.features is None:
            notes.append(
                f"{name} is left out: {printable(reference.source)} has no features, only their mean and covariance."
            )
        else:
            all_weights = torch.cat([torch.ones(1, count), weights])
            values = kernel_distance(
                features, reference.features, kernel, all_weights, reference.within(kernel), device
            )
            estimates[name] = Estimate.of(values[0].item(), values[1:], count)
    for whose, number in (("generated", count), ("reference", reference.statistics.count)):
        if number is not None and number <= dimensions:
            notes.append(
                f"{number} {whose} images for the {dimensions} dimensions of {extractor.name}: the covariance is "
                "singular and the Fréchet distance far too large; compare only rows of the same number of images."
            )
    if reference.skipped:
        notes.append(f"left out of {printable(reference.source)}: {in_words(reference.skipped)}.")
    return estimates, notes


@dataclass
class Fidelity:
    """Metrics of pairs of images.

    Args:
        values: For each metric, its value for each pair that could be compared.
        unequal: Number of pairs left out because their sizes differ.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    unequal: int = 0


def fidelity(
    images: Images, references: Images, metrics: dict[str, Metric], on_images: Callable[[int], None] | None = None
) -> Fidelity:
    """Compare the i-th image of one sequence with the i-th of the other. Unreadable images are left out."""
    result = Fidelity({name: [] for name in metrics})
    for index in range(len(images)):
        pixels, reference = images.read(index), references.read(index)
        if pixels is not None and reference is not None and pixels.shape != reference.shape:
            result.unequal += 1
        elif pixels is not None and reference is not None:
            for name, metric in metrics.items():
                result.values[name].append(metric(pixels / 255, reference / 255).item())
        if on_images:
            on_images(1)
    return result


def fidelities(
    images: Images,
    originals: Images,
    metrics: dict[str, Metric],
    resamples: int,
    on_images: Callable[[int], None] | None = None,
) -> tuple[dict[str, Estimate], list[str]]:
    """The mean of each metric over all pairs, and notes."""
    result = fidelity(images, originals, metrics, on_images)
    estimates = {
        name: mean_estimate(torch.tensor(values), resamples) for name, values in result.values.items() if values
    }
    return estimates, [f"{result.unequal} pairs of images differ in size and were left out."] if result.unequal else []


def clip_score(extractor: ClipFeatures, features: np.ndarray, prompts: Sequence[str], resamples: int) -> Estimate:
    """The mean CLIP score of image features (count, dimensions) and the images' prompts."""
    parts = []
    for start in range(0, len(prompts), extractor.batch_size):
        texts = extractor.of_texts(prompts[start : start + extractor.batch_size])
        parts.append(clip_scores(torch.tensor(features[start : start + extractor.batch_size]), texts))
    return mean_estimate(torch.cat(parts), resamples)
