"""How close each image is to the baseline's of the same prompt and seed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from tomesd_plus.evaluation.errors import EvaluationError, optional_import
from tomesd_plus.evaluation.images import Images

PSNR_CEILING = 100.0
Metric = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Fidelity:
    """The figures of each pair.

    Args:
        values: By metric, one for each pair that could be compared.
        unequal: Pairs that were left out because their sizes differ.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    unequal: int = 0


def psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of two pictures (3, height, width) in [0, 1].

    At most 100, which equal pictures get, and large ones that differ in a few last bits: infinity has no mean.
    """
    return peak_signal_noise_ratio(pixels, reference, data_range=1.0).clamp(max=PSNR_CEILING)


def ssim(pixels: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity, 1 for equal pictures, of two pictures (3, height, width) in [0, 1]."""
    result: Any = structural_similarity_index_measure(pixels[None], reference[None], data_range=1.0)
    return result


def load_lpips(device: str | torch.device = "cpu") -> Metric:
    """The learned distance LPIPS over AlexNet, of two pictures (3, height, width) in [0, 1]; 0 for equal ones.

    Raises:
        EvaluationError: torchvision is missing, or AlexNet's weights are not there and cannot be downloaded.
    """
    optional_import("torchvision", "LPIPS")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        network = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device).eval()
    except Exception as error:  # whatever a download makes torch.hub raise
        raise EvaluationError(f"LPIPS: cannot load AlexNet's weights: {error}") from error

    @torch.inference_mode()
    def lpips(pixels: Tensor, reference: Tensor) -> Tensor:
        value = network(pixels[None].to(device), reference[None].to(device))
        network.reset()  # it would gather all values
        return value.cpu()

    return lpips


def fidelity(
    images: Images, references: Images, metrics: dict[str, Metric], on_images: Callable[[int], None] | None = None
) -> Fidelity:
    """Compare images one by one; the i-th of each belong together. Those that cannot be read are left out."""
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
