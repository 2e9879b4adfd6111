"""Distances equal the formulas they are named after, on features of any shape."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from tomesd_plus.metrics import (
    Estimate,
    Statistics,
    distances,
    frechet_distance,
    gaussian_kernel,
    kernel_distance,
    mean_estimate,
    polynomial_kernel,
)
from tomesd_plus.metrics.intervals import resampling_weights


def features(count, dimensions, seed, rank=None):
    """Correlated features around a mean of their own; of a singular covariance if ``rank`` is less."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(rank or dimensions, dimensions, generator=generator)
    return torch.randn(count, len(factors), generator=generator) @ factors + torch.rand(
        dimensions, generator=generator
    )


def pytorch_fid(a, b):
    """The formula as pytorch-fid has it, with scipy's matrix root."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = a.double().numpy(), b.double().numpy()
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(sigma_a @ sigma_b)
    if not np.isfinite(root).all():
        offset = np.eye(len(sigma_a)) * 1e-6
        root = linalg.sqrtm((sigma_a + offset) @ (sigma_b + offset))
    return float(
        ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.trace(root.real)
    )


class Passing(torch.nn.Module):
    """Features come in, features go out."""

    def __init__(self, dimensions):
        super().__init__()
        self.num_features = dimensions

    def forward(self, x):
        return x


SHAPES = [(50, 300, 8, None), (1000, 40, 16, None), (20, 500, 32, None), (30, 30, 64, None), (200, 300, 24, 5)]


@pytest.mark.parametrize(("count", "other", "dimensions", "rank"), SHAPES)
def test_frechet_distance_is_pytorch_fids(count, other, dimensions, rank):
    a, b = features(count, dimensions, 0, rank), features(other, dimensions, 1, rank)
    ours = frechet_distance(Statistics.of(a), Statistics.of(b))
    assert ours > 1
    assert ours == pytest.approx(pytorch_fid(a, b), rel=1e-3)


@pytest.mark.parametrize(("count", "other", "dimensions", "rank"), SHAPES)
def test_frechet_distance_is_torchmetrics(count, other, dimensions, rank):
    a, b = features(count, dimensions, 0, rank), features(other, dimensions, 1, rank)
    ours = frechet_distance(Statistics.of(a), Statistics.of(b))
    metric = FrechetInceptionDistance(feature=Passing(dimensions)).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert ours == pytest.approx(metric.compute().item(), rel=1e-3)


def test_frechet_distance_is_symmetric_and_zero_for_the_same():
    a, b = Statistics.of(features(60, 12, 0)), Statistics.of(features(50, 12, 1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) < 1e-9 * a.covariance.trace()


@pytest.mark.parametrize("dimensions", [4, 64])
def test_kernel_distance_is_kid_over_all_pairs(dimensions):
    a, b = features(80, dimensions, 0), features(80, dimensions, 1)
    metric = KernelInceptionDistance(feature=Passing(dimensions), subsets=1, subset_size=80)
    metric.update(b, real=True)
    metric.update(a, real=False)
    ours = kernel_distance(a, b, polynomial_kernel).item()
    assert ours == pytest.approx(metric.compute()[0].item(), rel=1e-3)


def test_gaussian_kernel_distance_is_cmmd_without_pairs_of_one_feature():
    a = torch.nn.functional.normalize(features(30, 8, 0), dim=1).double()
    b = torch.nn.functional.normalize(features(40, 8, 1) + 3, dim=1).double()

    def mean(x, y, own):
        pairs = [
            np.exp(-float((p - q).square().sum()) / 200)
            for i, p in enumerate(x)
            for j, q in enumerate(y)
            if not own or i != j
        ]
        return sum(pairs) / len(pairs)

    expected = 1000 * (mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False))
    assert kernel_distance(a, b, gaussian_kernel).item() == pytest.approx(expected, rel=1e-9)
    assert expected > 0.1


def test_kernel_distance_of_one_distribution_is_about_zero():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, 8, generator=generator), torch.randn(400, 8, generator=generator)
    near, far = (kernel_distance(a, other, polynomial_kernel).item() for other in (b, b + 1))
    assert abs(near) < far / 50


def test_blocks_on_the_disk_give_the_same(tmp_path, monkeypatch):
    a, b = features(50, 6, 0), features(30, 6, 1)
    whole = Statistics.of(a), kernel_distance(a, b, polynomial_kernel).item()
    np.save(tmp_path / "a.npy", a.numpy())
    monkeypatch.setattr(distances, "BLOCK", 7)
    on_disk = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert torch.allclose(Statistics.of(on_disk).covariance, whole[0].covariance)
    assert kernel_distance(on_disk, b, polynomial_kernel).item() == pytest.approx(whole[1], rel=1e-9)


def test_weights_are_repetitions():
    a, weights = features(12, 3, 0), torch.tensor([2.0, 0.0, 1.0, 3.0] * 3)
    repeated = a.repeat_interleave(weights.int(), dim=0)
    ours, theirs = Statistics.of(a, weights), Statistics.of(repeated)
    assert torch.allclose(ours.mean, theirs.mean) and torch.allclose(ours.covariance, theirs.covariance)
    assert ours.count == theirs.count == 18
    ones = torch.stack([torch.ones(12), weights])
    plain, weighted = kernel_distance(a, features(9, 3, 1), polynomial_kernel, ones)
    assert plain == kernel_distance(a, features(9, 3, 1), polynomial_kernel)[0]
    b, w = features(9, 3, 1).double(), weights.double()
    inner, across, reference = (
        polynomial_kernel(x, y) for x, y in ((a.double(), a.double()), (a.double(), b), (b, b))
    )
    own = sum(w[i] * w[j] * inner[i, j] for i in range(12) for j in range(12) if i != j)
    pairs = sum(w[i] * w[j] for i in range(12) for j in range(12) if i != j)
    mixed = sum(w[i] * across[i, j] for i in range(12) for j in range(9)) / (18 * 9)
    theirs = (reference.sum() - reference.trace()) / (9 * 8)
    assert weighted.item() == pytest.approx((own / pairs + theirs - 2 * mixed).item(), rel=1e-9)


def test_an_eigenvalue_that_is_not_found_is_said(monkeypatch):
    def fails(*_):
        raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")

    a = Statistics.of(features(9, 4, 0))
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(ValueError, match=r"distance cannot be computed: .* failed to converge"):
        frechet_distance(a, a)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="count ≥ 2"):
        Statistics.of(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="not NaN or infinity"):
        Statistics.of(torch.tensor([[1.0, float("inf")], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="4 and of 3 dimensions"):
        frechet_distance(Statistics.of(features(9, 4, 0)), Statistics.of(features(9, 3, 0)))
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        kernel_distance(features(9, 4, 0), features(9, 3, 0), polynomial_kernel)
    with pytest.raises(ValueError, match="two features"):
        kernel_distance(torch.zeros(1, 3), torch.zeros(4, 3), polynomial_kernel)


def test_the_interval_of_a_mean_is_the_textbooks():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3 + 10
    estimate = mean_estimate(values, 2000)
    half = 1.96 * values.std().item() / 500**0.5
    assert estimate.value == pytest.approx(values.mean().item())
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.1)
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.1)
    assert mean_estimate(values, 0) == Estimate(estimate.value, None, None, 500)
    assert mean_estimate(values[:1], 100).low is None


def test_resamples_are_the_same_every_time_and_complete():
    weights = resampling_weights(40, 10)
    assert torch.equal(weights, resampling_weights(40, 10))
    assert (weights.sum(dim=1) == 40).all() and (weights == 0).any() and not torch.equal(weights[0], weights[1])
