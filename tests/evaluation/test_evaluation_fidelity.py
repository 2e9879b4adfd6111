"""Pictures compared with pictures, and rows with rows."""

import sys

import pytest
import torch
from PIL import Image

from tomesd_plus.evaluation import EvaluationError
from tomesd_plus.evaluation.fidelity import fidelity, load_lpips, psnr, ssim
from tomesd_plus.evaluation.images import Images
from tomesd_plus.evaluation.pictures import Point, pareto_front


def test_equal_images_have_the_highest_figures(tmp_path):
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert psnr(picture, picture) == 100 and ssim(picture, picture) == pytest.approx(1)
    assert psnr(picture, (picture + 0.1)) == pytest.approx(20, abs=0.01)


def test_lpips_is_used_where_it_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(EvaluationError, match="pip install torchvision"):
        load_lpips()
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    images = Images.of_paths([tmp_path / "a.png"])
    assert fidelity(images, images, {"LPIPS": lambda a, b: (a - b).abs().max()}).values == {"LPIPS": [0.0]}


def test_the_front_is_what_nothing_beats():
    points = [Point("a", 1.0, 40), Point("b", 1.5, 30), Point("c", 1.2, 30), Point("d", 1.4, 35), Point("e", 1.5, 29)]
    assert [point.name for point in pareto_front(points)] == ["a", "d", "b"]
