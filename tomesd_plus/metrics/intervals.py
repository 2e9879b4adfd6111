"""Estimates with 95 % intervals."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NORMAL_95 = 1.959964  # standard deviations


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Args:
        value: The figure.
        low, high: The interval's ends; ``None`` where none was asked for.
        count: Images that it rests on.
    """

    value: float
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, value: float, resampled: Tensor, count: int) -> "Estimate":
        """From a figure and the same figure of bootstrap resamples, (resamples,), which may be none.

        The interval is value ± 1.96 standard deviations of the resamples, not their percentiles: a distance between
        sets grows when images occur twice, so that the resamples of one lie all to one side of it.
        """
        resampled = resampled[resampled.isfinite()]  # of two or three images one may be drawn alone, and has no pairs
        if len(resampled) < 2:
            return cls(value, None, None, count)
        half = NORMAL_95 * resampled.double().std().item()
        return cls(value, value - half, value + half, count)


def resampling_weights(count: int, resamples: int, seed: int = 0) -> Tensor:
    """How often each of ``count`` images is in each bootstrap resample: (resamples, count), float32.

    The same for every configuration of the same count, so that figures of two differ by the configurations alone.
    """
    generator = np.random.default_rng(seed)
    weights = torch.empty(resamples, count)
    for row in weights:
        drawn = generator.integers(count, size=count)
        row.copy_(torch.from_numpy(np.bincount(drawn, minlength=count)))
    return weights


def mean_estimate(values: Tensor, resamples: int) -> Estimate:
    """The mean of (count ≥ 1,) values, with interval."""
    values = values.double()
    weights = resampling_weights(len(values), resamples if len(values) > 1 else 0).double()
    return Estimate.of(values.mean().item(), weights @ values / len(values), len(values))
