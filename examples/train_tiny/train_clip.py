"""A tokenizer and a small CLIP, trained contrastively; its text encoder becomes the pipeline's."""

import json
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from .data import picture_batch, scenes
from .loop import Clock, train
from .presets import Preset

MAX_LENGTH = 77  # as in Stable Diffusion


def make_tokenizer() -> CLIPTokenizer:
    """Learn byte-pair merges from captions. Any other text falls apart into its bytes, as in CLIP."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False, False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2048, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((scene.caption for scene in islice(scenes(0), 20_000)), trainer)
    learned = [tuple(merge) for merge in _merges(bpe)]
    words = alphabet + [f"{character}</w>" for character in alphabet] + ["".join(merge) for merge in learned]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=learned, model_max_length=MAX_LENGTH)


def make_clip(preset: Preset, tokenizer: CLIPTokenizer) -> CLIPModel:
    """The model with random weights; heads of 32 channels."""
    tower = {
        "hidden_size": preset.clip_width,
        "intermediate_size": 4 * preset.clip_width,
        "num_hidden_layers": preset.clip_layers,
        "num_attention_heads": max(1, preset.clip_width // 32),
    }
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"image_size": preset.image_size, "patch_size": preset.image_size // 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=preset.clip_width // 2))


def train_clip(preset: Preset, folder: Path, seed: int = 0) -> tuple[CLIPModel, CLIPTokenizer]:
    """Train on picture-caption pairs made on the fly."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_clip(preset, tokenizer)

    def loss_of(model: nn.Module, batch: tuple[list[str], Tensor], clock: Clock) -> Tensor:
        captions, pixels = batch
        device = next(model.parameters()).device
        tokens = tokenizer(captions, padding=True, return_tensors="pt").to(device)
        return model(**tokens, pixel_values=pixels.to(device), return_loss=True).loss

    make = partial(_captioned_pictures, preset.clip_batch, preset.image_size, seed)
    trained = train(model, loss_of, folder / "clip", preset.clip_minutes, 1e-3, make=make, workers=preset.workers)
    return trained, tokenizer


def _captioned_pictures(count: int, size: int, seed: int, step: int) -> tuple[list[str], Tensor]:
    batch = list(islice(scenes((seed, 1, step)), count))
    return [scene.caption for scene in batch], picture_batch(batch, size, (seed, 2, step))


def _merges(bpe: Tokenizer) -> list[list[str]]:
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
