"""The Inception Score against closed forms and torch-fidelity."""

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from lightning_prune.metrics.inception_score import inception_score
from lightning_prune.protocols import InputError


def scores(count: int, seed: int = 0, classes: int = 10) -> Tensor:
    return 2 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def test_certain_and_balanced_classes_score_their_number() -> None:
    logits = 100 * torch.eye(10).repeat(20, 1)
    assert inception_score(logits, splits=10).value == pytest.approx(10, abs=1e-9)


def test_equal_scores_are_worth_one() -> None:
    found = inception_score(scores(1).repeat(40, 1), splits=2)
    assert found.value == pytest.approx(1)
    assert found.standard_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("count", "splits"), [(200, 10), (203, 10), (200, 1)])
def test_it_is_torch_fidelitys(count: int, splits: int) -> None:
    expected = isc_features_to_metric(scores(count), splits=splits, shuffle=False)[KEY_METRIC_ISC_MEAN]
    assert inception_score(scores(count), splits).value == pytest.approx(expected, rel=1e-12)


def test_the_interval_is_as_wide_as_the_spread_over_samples() -> None:
    found = [inception_score(scores(1000, seed), splits=2) for seed in range(100)]
    spread = float(torch.tensor([f.value for f in found]).std())
    assert sum(f.standard_error for f in found) / len(found) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (None, "no class layer"),
        (torch.zeros(19, 10), "19 samples do not fill 10 splits"),
        (torch.full((40, 10), torch.nan), "not finite"),
    ],
)
def test_bad_scores(logits: Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inception_score(logits)
