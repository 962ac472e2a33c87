"""The kernel distance against torchmetrics, its expectation and its interval; checks on features."""

import math
import warnings

import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from lightning_prune.metrics import features as checks
from lightning_prune.metrics.features import check_features, rank_deficient, warn_if_rank_deficient
from lightning_prune.metrics.frechet import Distance, paired_difference
from lightning_prune.metrics.kid import kernel_distance
from lightning_prune.protocols import InputError


def draw(count: int, seed: int, shift: float = 0.0, dims: int = 8) -> Tensor:
    return shift + torch.randn(count, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_it_is_torchmetrics_value_on_one_subset(shift: float) -> None:
    x, y = draw(300, 0, shift), draw(300, 1)
    assert kernel_distance(x, y).value == pytest.approx(float(poly_mmd(y, x)), rel=1e-9, abs=1e-12)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,100 rows are three blocks."""
    x, y = draw(2100, 0, 0.2), draw(2100, 1)
    assert kernel_distance(x, y).value == pytest.approx(float(poly_mmd(y, x)), rel=1e-9)


def test_it_is_unbiased_at_equal_distributions() -> None:
    values = torch.tensor([kernel_distance(draw(60, seed), draw(80, 1000 + seed)).value for seed in range(200)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(len(values))
    assert float(values.min()) < 0


def test_subsets_estimate_the_same_number() -> None:
    x, y = draw(1000, 0, 0.3), draw(1000, 1)
    generator = torch.Generator().manual_seed(0)
    subsets = torch.tensor(
        [
            kernel_distance(*(z[torch.randperm(1000, generator=generator)[:100]] for z in (x, y))).value
            for _ in range(100)
        ]
    )
    assert kernel_distance(x, y).value == pytest.approx(float(subsets.mean()), abs=3 * float(subsets.std()) / 10)


def test_the_interval_is_as_wide_as_the_spread_over_samples() -> None:
    reference = draw(500, 1)
    found = [kernel_distance(draw(200, 10 + seed, 0.4), reference) for seed in range(150)]
    spread = float(torch.tensor([f.value for f in found]).std())
    assert sum(f.standard_error for f in found) / len(found) == pytest.approx(spread, rel=0.15)
    expected = sum(f.value for f in found) / len(found)
    assert sum(f.low <= expected <= f.high for f in found) >= 0.9 * len(found)


def test_near_zero_the_interval_is_not_too_narrow() -> None:
    reference = draw(400, 1)
    found = [kernel_distance(draw(200, 10 + seed), reference) for seed in range(100)]
    expected = sum(f.value for f in found) / len(found)
    assert sum(f.low <= expected <= f.high for f in found) >= 0.9 * len(found)


def test_influences_pair_two_models() -> None:
    x, y = draw(300, 0), draw(1000, 1)
    a, b = kernel_distance(x + 0.30, y), kernel_distance(x + 0.31, y)
    difference = paired_difference(b, a)
    assert isinstance(a, Distance)
    assert difference.standard_error < 0.2 * math.hypot(a.standard_error, b.standard_error)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), "at least two samples"),
        (torch.zeros(4, 3), torch.zeros(1, 3), "at least two samples"),
        (torch.zeros(4), torch.zeros(4, 3), "at least two samples"),
        (torch.full((4, 3), torch.inf), torch.zeros(4, 3), "not finite"),
        (torch.zeros(4, 3), torch.full((4, 3), torch.nan), "not finite"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "3 dimensions against 2"),
    ],
)
def test_bad_features(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kernel_distance(x, y)


def test_good_features_pass() -> None:
    check_features(torch.zeros(2, 3))


@pytest.mark.parametrize(("samples", "deficient"), [(96, True), (97, False)])
def test_a_covariance_of_n_samples_has_rank_n_minus_one(samples: int, deficient: bool) -> None:
    assert rank_deficient(samples, 96) is deficient
    assert (int(torch.linalg.matrix_rank(draw(samples, 0, dims=96).T.cov())) < 96) is deficient


def test_too_few_samples_are_warned_about_once() -> None:
    checks._warned().clear()
    with pytest.warns(UserWarning, match="fid: 32 samples for 2048 dimensions"):
        assert warn_if_rank_deficient("fid", 32, 2048)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_if_rank_deficient("fid", 64, 2048)
        assert not warn_if_rank_deficient("fd_fashion", 1000, 96)
    checks._warned().clear()
