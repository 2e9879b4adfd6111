"""Fidelity: how close an image is to the one it should equal."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

PSNR_CEILING = 100.0
Metric = Callable[[Tensor, Tensor], Tensor]


def psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of two pictures (3, height, width) in [0, 1].

    At most 100, which equal pictures get, and large ones that differ in a few last bits: infinity has no mean.
    """
    return peak_signal_noise_ratio(pixels, reference, data_range=1.0).clamp(max=PSNR_CEILING)


def ssim(pixels: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity, 1 for equal pictures, of two pictures (3, height, width) in [0, 1]."""
    result: Any = structural_similarity_index_measure(pixels[None], reference[None], data_range=1.0)
    return result


def lpips_metric(network: Any, device: str | torch.device = "cpu") -> Metric:
    """LPIPS by torchmetrics' network, of two images (3, height, width) in [0, 1]; 0 for equal ones."""
    network = network.to(device).eval()

    @torch.inference_mode()
    def lpips(pixels: Tensor, reference: Tensor) -> Tensor:
        value = network(pixels[None].to(device), reference[None].to(device))
        network.reset()  # a torchmetrics metric keeps a state per call
        return value.cpu()

    return lpips
