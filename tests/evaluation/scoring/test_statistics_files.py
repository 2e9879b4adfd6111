"""Files of mean and covariance, as pytorch-fid has them."""

import numpy as np
import pytest
import torch

from tomesd_plus.evaluation.scoring.reference import load_statistics, save_statistics
from tomesd_plus.metrics import Statistics, frechet_distance


def test_statistics_are_pytorch_fids_files(tmp_path):
    ours = Statistics.of(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    np.savez(tmp_path / "theirs.npz", mu=ours.mean.numpy(), sigma=ours.covariance.numpy())
    assert load_statistics(tmp_path / "theirs.npz").count is None
    assert frechet_distance(ours, load_statistics(tmp_path / "theirs.npz")) < 1e-9
    save_statistics(ours, tmp_path / "ours.npz", features=np.zeros(3))
    with np.load(tmp_path / "ours.npz") as file:
        assert set(file.files) == {"mu", "sigma", "count", "features"}


def test_files_of_anything_else_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="no sigma"):
        load_statistics(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="holds NaN"):
        load_statistics(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="do not fit"):
        load_statistics(tmp_path / "x.npz")
