"""Fidelity: how close an image is to a reference image, pixel by pixel or perceptually."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

PSNR_CEILING = 100.0
Metric = Callable[[Tensor, Tensor], Tensor]


def psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of two images (3, height, width) in [0, 1].

    At most 100, the value of equal images: with infinity there would be no mean over images.
    """
    return peak_signal_noise_ratio(pixels, reference, data_range=1.0).clamp(max=PSNR_CEILING)


def ssim(pixels: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of two images (3, height, width) in [0, 1]; 1 for equal ones."""
    result: Any = structural_similarity_index_measure(pixels[None], reference[None], data_range=1.0)
    return result


def lpips_metric(network: Any, device: str | torch.device = "cpu") -> Metric:
    """LPIPS as a function of two images (3, height, width) in [0, 1]; 0 for equal ones.

    Args:
        network: torchmetrics' ``LearnedPerceptualImagePatchSimilarity`` with ``normalize=True``.
        device: Where to compute.
    """
    network = network.to(device).eval()

    @torch.inference_mode()
    def lpips(pixels: Tensor, reference: Tensor) -> Tensor:
        value = network(pixels[None].to(device), reference[None].to(device))
        network.reset()  # otherwise the metric accumulates all values
        return value.cpu()

    return lpips
