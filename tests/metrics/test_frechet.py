"""The Frechet distance against closed forms, its interval against a bootstrap."""

import math

import pytest
import torch
from torch import Tensor

from lightning_prune.metrics.frechet import (
    Distance,
    Moments,
    distance,
    frechet_distance,
    influence,
    paired_difference,
    precision_recall,
)
from lightning_prune.protocols import InputError


def features(count: int, dims: int = 6, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dims, dims, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return shift + scale * torch.randn(count, dims, generator=generator, dtype=torch.float64) @ mixing


def test_a_set_is_at_distance_zero_from_itself() -> None:
    moments = Moments.of(features(500))
    assert abs(frechet_distance(moments, moments)) < 1e-6


def test_a_shifted_set_has_the_closed_form() -> None:
    x = features(400)
    assert frechet_distance(Moments.of(x + 0.5), Moments.of(x)) == pytest.approx(6 * 0.25, abs=1e-8)


def test_a_scaled_set_has_the_closed_form() -> None:
    """For Sigma and s^2 Sigma the trace term is (s - 1)^2 tr Sigma."""
    x = features(400)
    x = x - x.mean(0)
    expected = 0.3**2 * Moments.of(x).covariance.trace()
    assert frechet_distance(Moments.of(1.3 * x), Moments.of(x)) == pytest.approx(float(expected), rel=1e-9)


def test_it_agrees_with_the_general_matrix_root() -> None:
    a, b = Moments.of(features(300, seed=1, shift=0.2)), Moments.of(features(300, seed=2, scale=1.4))
    values = torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().sum().real
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * values
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_influence_is_the_derivative_of_the_distance() -> None:
    """Doubling the weight of one sample by a little moves the distance by its influence."""
    x, reference = features(200, shift=0.3), Moments.of(features(1000, seed=5))
    plain = Moments(x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / len(x), len(x))
    expected = influence(x, plain, reference)
    step = 1e-6
    for index in (0, 7, 100):
        weights = torch.full((len(x),), (1 - step) / len(x), dtype=torch.float64)
        weights[index] += step
        mean = weights @ x
        centred = x - mean
        tilted = Moments(mean, (centred * weights[:, None]).T @ centred, len(x))
        slope = (frechet_distance(tilted, reference) - frechet_distance(plain, reference)) / step
        assert slope == pytest.approx(float(expected[index]), rel=1e-3, abs=1e-3)


def test_the_interval_is_as_wide_as_a_bootstrap() -> None:
    x, reference = features(800, shift=0.3, scale=1.1), Moments.of(features(4000, seed=5))
    generator = torch.Generator().manual_seed(0)
    replicates = torch.tensor(
        [
            frechet_distance(Moments.of(x[torch.randint(0, 800, (800,), generator=generator)]), reference)
            for _ in range(400)
        ]
    )
    assert distance(x, reference).standard_error == pytest.approx(float(replicates.std()), rel=0.15)


def test_the_interval_covers_the_limit() -> None:
    reference = Moments.of(features(200_000, seed=77))
    limit = frechet_distance(Moments.of(features(200_000, seed=78, shift=0.4)), reference)
    covered = 0
    for seed in range(100):
        found = distance(features(2000, seed=1000 + seed, shift=0.4), reference)
        covered += found.low <= limit <= found.high
    assert covered >= 88


def test_in_96_dimensions_it_covers_the_expectation_at_that_count() -> None:
    """The plug-in distance is biased by D/n; the interval speaks of its expectation at n, which replicates give."""
    spectrum = torch.exp(-torch.arange(96, dtype=torch.float64) / 20)

    def draw(seed: int, count: int) -> Tensor:
        return torch.randn(count, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spectrum

    reference = Moments.of(draw(1, 8000))
    found = [distance(1.1 * draw(100 + seed, 1000) + 0.05, reference) for seed in range(40)]
    expected = sum(d.value for d in found) / len(found)
    assert sum(d.low <= expected <= d.high for d in found) >= 35
    widths = sum(d.standard_error for d in found) / len(found)
    spread = float(torch.tensor([d.value for d in found]).std())
    assert widths == pytest.approx(spread, rel=0.35)


def test_pairing_narrows_the_interval() -> None:
    noise, reference = features(500, seed=3), Moments.of(features(4000, seed=5))
    a, b = distance(noise + 0.30, reference), distance(noise + 0.31, reference)
    difference = paired_difference(b, a)
    assert difference.value == pytest.approx(b.value - a.value)
    assert difference.standard_error < 0.1 * math.hypot(a.standard_error, b.standard_error)


def test_pairs_need_equal_counts() -> None:
    with pytest.raises(InputError, match="3 samples against 2"):
        paired_difference(Distance(1.0, torch.zeros(3)), Distance(1.0, torch.zeros(2)))


@pytest.mark.parametrize(
    ("x", "message"), [(torch.zeros(1, 3), "two samples"), (torch.full((4, 3), torch.nan), "finite")]
)
def test_bad_features(x: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Moments.of(x)


def test_fewer_samples_than_dimensions_is_finite() -> None:
    found = distance(features(5, dims=20), Moments.of(features(100, dims=20, seed=3)))
    assert math.isfinite(found.value)
    assert math.isfinite(found.standard_error)


def test_precision_and_recall_of_equal_and_disjoint_sets() -> None:
    x = features(100)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 1000) == (0.0, 0.0)
    assert precision_recall(x[:20] * 0, x)[1] < 0.2
