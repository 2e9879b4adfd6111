"""LPIPS, where torchvision is installed."""

import sys

import pytest
from PIL import Image

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.images import Images
from tomesd_plus.evaluation.scoring import load_lpips
from tomesd_plus.evaluation.scoring.estimates import fidelity


def test_lpips_is_used_where_it_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(EvaluationError, match="pip install torchvision"):
        load_lpips()
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    images = Images.of_paths([tmp_path / "a.png"])
    assert fidelity(images, images, {"LPIPS": lambda a, b: (a - b).abs().max()}).values == {"LPIPS": [0.0]}
