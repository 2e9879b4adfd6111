"""From pictures and prompts to feature vectors."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from tomesd_plus.evaluation.errors import EvaluationError, optional_import
from tomesd_plus.evaluation.images import Images
from tomesd_plus.tiny import TINY_CLIP

INCEPTION = "inception"
TINY = "tiny"


class Extractor(Protocol):
    """Turns pictures into features.

    Attributes:
        name: Shown beside distances over its features.
        dimensions: Of a feature.
        batch_size: Pictures at a time.
    """

    name: str
    dimensions: int
    batch_size: int

    def of_images(self, images: Tensor) -> Tensor:
        """From (count, 3, height, width), uint8, to (count, dimensions), float32, on the CPU."""


class ClipFeatures:
    """The image and text features of a CLIP model.

    Args:
        model: Its weights.
        tokenizer: Its tokenizer.
        processor: What prepares its pictures: resizes, crops, normalizes.
        batch_size: Pictures or texts at a time.
        name: Shown beside figures that rest on it.
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
        """Load a CLIP model by hub id or from a folder, in float32; ``label`` is its name in tables."""
        model = CLIPModel.from_pretrained(name).to(device, torch.float32)
        # Of two that transformers 5 has, the one that resizes with Pillow: features do not hang on what is installed
        processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        return cls(
            model, CLIPTokenizer.from_pretrained(name), processor.from_pretrained(name), name=label or str(name)
        )

    def of_images(self, images: Tensor) -> Tensor:
        """Features (count, dimensions) of length 1, float32, on the CPU.

        Args:
            images: (count, 3, height, width), uint8, of any size.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(
                f"expected uint8 images (count, 3, height, width), not {images.dtype} {tuple(images.shape)}"
            )
        return self._features(self._image_features, images)

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Features (count, dimensions) of length 1, float32, on the CPU. Texts that are too long are cut off."""
        return self._features(self._text_features, texts)

    @torch.inference_mode()
    def _features(self, function: Any, items: Any) -> Tensor:
        parts = [function(items[start : start + self.batch_size]) for start in range(0, len(items), self.batch_size)]
        # transformers 5 returns the features inside an output, 4 as they are
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
    """InceptionV3's pooled features, (count, 2048), over which Fréchet and kernel distances are called FID and KID.

    Network and resizing are torch-fidelity's ports of the original ones in TensorFlow, without antialiasing, as in
    torchmetrics with ``antialias=False``. pytorch-fid places the pixels of a resized picture a little differently, so
    its figures may differ in their last digits; compare only figures of one extractor.

    Args:
        weights: The port's weights as a file; downloaded by default.
        device: Where it runs.
    """

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu") -> None:
        if weights is not None and not Path(weights).is_file():
            raise EvaluationError(f"InceptionV3's weights: there is no file {weights}")
        network = "torch_fidelity.feature_extractor_inceptionv3"
        module = optional_import(network, "features of InceptionV3", "torch-fidelity")
        try:
            model = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
        except Exception as error:  # no network, a broken file: whatever the download and the loader raise
            raise EvaluationError(
                f"cannot load InceptionV3's weights: {error}. Without a network, fetch torch-fidelity's "
                "weights-inception-2015-12-05-6726825d.pth elsewhere and name the file with --inception-weights"
            ) from error
        self.model = model.eval().to(device)
        self.device = torch.device(device)
        self.name = "InceptionV3"
        self.dimensions = 2048
        self.batch_size = 32

    @torch.inference_mode()
    def of_images(self, images: Tensor) -> Tensor:
        """Features (count, 2048), float32, on the CPU, of uint8 images (count, 3, height, width)."""
        return self.model(images.to(self.device))[0].flatten(1).float().cpu()


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
        return InceptionFeatures(inception_weights, device)
    try:
        return ClipFeatures.load(TINY_CLIP, device, "tiny CLIP") if name == TINY else ClipFeatures.load(name, device)
    except Exception as error:  # whatever a stranger's files or a missing network make the loaders raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EvaluationError(f"cannot load the CLIP model {name!r}: {reason}") from error


def distance_device(extractor: Extractor) -> torch.device:
    """Where distances over its features are computed: on its GPU, if that has float64 numbers, as NVIDIA's have."""
    device = torch.device(getattr(extractor, "device", "cpu"))
    return device if device.type == "cuda" else torch.device("cpu")


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


def clip_scores(image_features: Tensor, text_features: Tensor) -> Tensor:
    """100 · max(cosine, 0) for each picture and its text: (count,), from features (count, dimensions) of length 1.

    From Hessel et al., "CLIPScore", https://arxiv.org/abs/2104.08718, with the factor that reports use.
    """
    return 100 * (image_features * text_features).sum(dim=-1).clamp(min=0)
