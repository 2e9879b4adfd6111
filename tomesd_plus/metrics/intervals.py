"""Estimates with 95 % bootstrap intervals."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

NORMAL_95 = NormalDist().inv_cdf(0.975)  # half-width of a 95 % interval, in standard deviations


@dataclass(frozen=True)
class Estimate:
    """A metric's value with its 95 % interval.

    Args:
        value: The metric's value.
        low, high: Bounds of the interval; ``None`` without an interval.
        count: Number of images.
    """

    value: float
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, value: float, resampled: Tensor, count: int) -> "Estimate":
        """Make an estimate from a value and its values on bootstrap resamples, (resamples ≥ 0,).

        The interval is value ± 1.96 standard deviations, not percentiles of the resamples: repeated images increase a
        distance between sets, so all resamples may lie above its value.
        """
        resampled = resampled[resampled.isfinite()]  # a resample of one image, repeated, has no pairs of distinct ones
        if len(resampled) < 2:
            return cls(value, None, None, count)
        half = NORMAL_95 * resampled.double().std().item()
        return cls(value, value - half, value + half, count)


def resampling_weights(count: int, resamples: int, seed: int = 0) -> Tensor:
    """How often each of ``count`` images occurs in each bootstrap resample: (resamples, count), float32.

    The same for every configuration with this count, so that two differ by the configurations only.
    scipy.stats.bootstrap gives the same intervals of a mean, but has no weights, with which a kernel distance computes
    each kernel value once for all resamples.
    """
    generator = np.random.default_rng(seed)
    weights = torch.empty(resamples, count)
    for row in weights:
        drawn = generator.integers(count, size=count)
        row.copy_(torch.from_numpy(np.bincount(drawn, minlength=count)))
    return weights


def mean_estimate(values: Tensor, resamples: int) -> Estimate:
    """The mean of values, (count ≥ 1,), with its interval."""
    values = values.double()
    weights = resampling_weights(len(values), resamples if len(values) > 1 else 0).double()
    return Estimate.of(values.mean().item(), weights @ values / len(values), len(values))
