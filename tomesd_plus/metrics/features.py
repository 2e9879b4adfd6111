"""Feature extractors for images and texts, and the CLIP score."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer


class Extractor(Protocol):
    """Computes features of images.

    Attributes:
        name: Shown in the names of distances that use its features.
        dimensions: Length of a feature vector.
        batch_size: Images per batch.
    """

    name: str
    dimensions: int
    batch_size: int

    def of_images(self, images: Tensor) -> Tensor:
        """Map uint8 images (count, 3, height, width) to float32 features (count, dimensions) on the CPU."""


class ClipFeatures:
    """The image and text features of a CLIP model.

    Args:
        model: The CLIP model.
        tokenizer: The model's tokenizer.
        processor: The model's image processor, which resizes, crops and normalizes.
        batch_size: Images or texts per batch.
        name: Shown in the names of metrics that use its features.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        processor: Any,
        batch_size: int = 64,
        name: str = "CLIP",
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.processor = processor
        self.batch_size = batch_size
        self.name = name
        self.dimensions: int = model.config.projection_dim
        self.device: torch.device = model.device

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu", label: str | None = None) -> "ClipFeatures":
        """Load a CLIP model by hub id or from a folder, in float32; ``label`` is the name shown in tables.

        Weights are read from safetensors only.
        """
        model = CLIPModel.from_pretrained(name, use_safetensors=True).to(device, torch.float32)
        # transformers 5 has two processors; with Pillow's, features do not depend on whether torchvision is installed
        processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        return cls(
            model, CLIPTokenizer.from_pretrained(name), processor.from_pretrained(name), name=label or str(name)
        )

    def of_images(self, images: Tensor) -> Tensor:
        """Compute float32 features (count, dimensions) of unit length, on the CPU.

        Args:
            images: (count, 3, height, width), uint8, of any size.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(
                f"expected uint8 images (count, 3, height, width), not {images.dtype} {tuple(images.shape)}"
            )
        return self._features(self._image_features, images)

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Compute float32 features (count, dimensions) of unit length, on the CPU. Long texts are truncated."""
        return self._features(self._text_features, texts)

    @torch.inference_mode()
    def _features(self, function: Any, items: Any) -> Tensor:
        parts = [function(items[start : start + self.batch_size]) for start in range(0, len(items), self.batch_size)]
        # transformers 5 wraps the features in an output object, transformers 4 returns the tensor
        tensors = [part if isinstance(part, Tensor) else part.pooler_output for part in parts]
        return torch.cat([torch.nn.functional.normalize(tensor, dim=-1).cpu() for tensor in tensors])

    def _image_features(self, images: Tensor) -> Any:
        arrays = list(images.permute(0, 2, 3, 1).numpy())
        pixels = self.processor(arrays, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        return self.model.get_image_features(pixel_values=pixels.to(self.model.device))

    def _text_features(self, texts: Sequence[str]) -> Any:
        most = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.model.device))


class InceptionFeatures:
    """InceptionV3's pooled features, (count, 2048), with which Fréchet and kernel distances are called FID and KID.

    Network and resizing are torch-fidelity's ports of the original TensorFlow code, without antialiasing, as in
    torchmetrics with ``antialias=False``. pytorch-fid resizes slightly differently, so its values may differ in the
    last digits; compare only values from one extractor.

    Args:
        model: torch-fidelity's ``FeatureExtractorInceptionV3`` with the output "2048".
        device: Where it runs.
    """

    def __init__(self, model: torch.nn.Module, device: str | torch.device = "cpu") -> None:
        self.model = model.eval().to(device)
        self.device = torch.device(device)
        self.name = "InceptionV3"
        self.dimensions = 2048
        self.batch_size = 32

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str | torch.device = "cpu") -> "InceptionFeatures":
        """Load weights from a file; by default they are downloaded. Needs torch-fidelity."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = None if weights is None else str(weights)
        return cls(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path), device)

    @torch.inference_mode()
    def of_images(self, images: Tensor) -> Tensor:
        """Compute float32 features (count, 2048), on the CPU, of uint8 images (count, 3, height, width)."""
        return self.model(images.to(self.device))[0].flatten(1).float().cpu()


def clip_scores(image_features: Tensor, text_features: Tensor) -> Tensor:
    """The CLIP score, 100 · max(cosine, 0), of each image and its text: (count,).

    From Hessel et al., "CLIPScore", https://arxiv.org/abs/2104.08718, with the usual factor of 100. torchmetrics'
    CLIPScore does not work with transformers 5 (torchmetrics 1.9.0).

    Args:
        image_features, text_features: (count, dimensions), of unit length.
    """
    return 100 * (image_features * text_features).sum(dim=-1).clamp(min=0)
