"""Features and the scores that rest on them."""

import pytest
import torch

from tomesd_plus.metrics import clip_scores


def test_clip_scores_are_hundredfold_cosines_and_never_negative():
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1, 0]])
    assert clip_scores(images, texts).tolist() == pytest.approx([100.0, 80.0, 0.0])
