"""How far apart two sets of pictures are: pure functions of their features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of features.

    Args:
        mean: (dimensions,), float64.
        covariance: (dimensions, dimensions), float64, normalized by count − 1.
        count: Number of features, where it is known; other tools' files do not tell.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    @classmethod
    def of(cls, features: Tensor) -> "Statistics":
        """Of features (count, dimensions); at least two, else ValueError."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"statistics need features (count ≥ 2, dimensions), not {tuple(features.shape)}")
        features = features.double().cpu()
        return cls(features.mean(dim=0), features.T.cov(), len(features))

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read a ``.npz`` file with the entries ``mu`` and ``sigma``, as pytorch-fid writes it."""
        with np.load(path) as file:
            if missing := {"mu", "sigma"} - set(file.files):
                raise ValueError(f"{path} has no {' and '.join(sorted(missing))}: not a file of statistics")
            count = int(file["count"]) if "count" in file.files else None
            return cls(torch.from_numpy(file["mu"]).double(), torch.from_numpy(file["sigma"]).double(), count)

    def save(self, path: str | Path, **more: np.ndarray) -> None:
        """Write a ``.npz`` file that pytorch-fid can read; ``more`` are further arrays to keep beside."""
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy(), **more}
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        np.savez_compressed(path, **arrays)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The Fréchet distance of two normal distributions; over InceptionV3's features it is called FID.

    It grows as features become fewer: compare only sets of the same count. Covariances may be singular.

    From Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", https://arxiv.org/abs/1706.08500.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * mixed
    return max(0.0, distance.item())
