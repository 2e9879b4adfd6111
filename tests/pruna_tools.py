"""What the tests of the plug-in for Pruna share; importing it skips them where Pruna is not installed."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

try:
    version("pruna")  # not by an import: the folder tests/pruna is something to import too
except PackageNotFoundError:
    reason = "Pruna is not installed: make test-pruna runs these in an environment of its own"
    pytest.skip(reason, allow_module_level=True)
os.environ["PRUNA_METRICS_ENABLED"] = "false"  # before Pruna is imported: no test uses a network

import torch
from conftest import generate
from pruna import PrunaModel, SmashConfig, smash
from transformers import ViTConfig, ViTForImageClassification

import tomesd_plus.integrations.pruna  # noqa: F401

IN_A_FRESH_PROCESS = """
import os
os.environ |= {"PRUNA_METRICS_ENABLED": "false", "HF_HUB_OFFLINE": "1"}
import examples.pruna_torchvision
from pruna import PrunaModel, SmashConfig
"""


def smashed(model: Any, algorithms: Any, **options: Any) -> Any:
    """A model smashed on the CPU: the model itself, without Pruna's wrapper."""
    return smash(model, SmashConfig(algorithms, device="cpu"), **options).model


def saved_and_loaded(model: Any, algorithms: Any, folder: Path) -> Any:
    """A model that was smashed, saved and loaded."""
    smash(model, SmashConfig(algorithms, device="cpu")).save_pretrained(folder)
    loaded = PrunaModel.from_pretrained(folder).model
    if hasattr(loaded, "set_progress_bar_config"):
        loaded.set_progress_bar_config(disable=True)
    return loaded


def make_vit() -> ViTForImageClassification:
    """A classifier with random weights: 64 patches, three layers, five classes."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    """Pictures of a pipeline, (1, 3, 32, 32), or logits of a classifier, (2, 5)."""
    if hasattr(model, "unet"):
        return generate(model)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model(pixel_values=pixels.to(next(model.parameters()).dtype)).logits
