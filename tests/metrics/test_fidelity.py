"""Fidelity of one image to another."""

import pytest
import torch

from tomesd_plus.metrics import psnr, ssim


def test_equal_images_have_the_highest_figures(tmp_path):
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert psnr(picture, picture) == 100 and ssim(picture, picture) == pytest.approx(1)
    assert psnr(picture, (picture + 0.1)) == pytest.approx(20, abs=0.01)
