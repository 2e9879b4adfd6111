"""Fidelity, distances between image sets, features and intervals: pure functions of tensors."""

from tomesd_plus.metrics.distances import (
    Statistics,
    frechet_distance,
    gaussian_kernel,
    kernel_distance,
    polynomial_kernel,
)
from tomesd_plus.metrics.features import ClipFeatures, Extractor, InceptionFeatures, clip_scores
from tomesd_plus.metrics.fidelity import PSNR_CEILING, psnr, ssim
from tomesd_plus.metrics.intervals import Estimate, mean_estimate

__all__ = [
    "PSNR_CEILING",
    "ClipFeatures",
    "Estimate",
    "Extractor",
    "InceptionFeatures",
    "Statistics",
    "clip_scores",
    "frechet_distance",
    "gaussian_kernel",
    "kernel_distance",
    "mean_estimate",
    "polynomial_kernel",
    "psnr",
    "ssim",
]
