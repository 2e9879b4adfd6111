"""From pictures and prompts to feature vectors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer


class ClipFeatures:
    """The image and text features of a CLIP model.

    Args:
        model: Its weights.
        tokenizer: Its tokenizer.
        processor: What prepares its pictures: resizes, crops, normalizes.
        batch_size: Pictures or texts at a time.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessor, batch_size: int = 64
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.processor = processor
        self.batch_size = batch_size

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu") -> "ClipFeatures":
        """Load a CLIP model by hub id or from a folder, in float32."""
        model = CLIPModel.from_pretrained(name).to(device, torch.float32)
        return cls(model, CLIPTokenizer.from_pretrained(name), CLIPImageProcessor.from_pretrained(name))

    def of_images(self, images: Tensor) -> Tensor:
        """Features (count, dimensions) of length 1, float32, on the CPU.

        Args:
            images: (count, 3, height, width), uint8, of any size.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"expected uint8 images (count, 3, height, width), not {images.dtype} {images.shape}")
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
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.model.device))


def clip_scores(image_features: Tensor, text_features: Tensor) -> Tensor:
    """100 · max(cosine, 0) for each picture and its text: (count,), from features (count, dimensions) of length 1.

    From Hessel et al., "CLIPScore", https://arxiv.org/abs/2104.08718, with the factor that reports use.
    """
    return 100 * (image_features * text_features).sum(dim=-1).clamp(min=0)
