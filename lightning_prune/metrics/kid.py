"""The kernel distance between two sets of features, with an interval; on Inception's features it is KID.

    KD = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),  k(a, b) = (a.b / D + 1)^3

the unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, equation 3; Binkowski et al. 2018).
All pairs are used rather than random subsets, so the value is deterministic; a mean over subsets estimates the same
number. It may be below zero.

The interval is the infinitesimal jackknife's, as for the Frechet distance, with the reference held fixed. Near zero
the first-order terms vanish and it is wider than need be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.metrics.features import check_features
from lightning_prune.metrics.frechet import Distance


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """Polynomial kernel [N, M] of degree three."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(features: Tensor, reference: Tensor) -> Distance:
    """Unbiased kernel distance of `features` [N, D] from `reference` [M, D], with each sample's influence [N] on it.

    Computed in float64, in blocks of rows: memory grows with M, time with (N + M)^2 D.

    Raises:
        InputError: fewer than two samples, features that are not finite, or other dimensions than the reference.
    """
    check_features(features, reference)
    x, y = features.double(), reference.double()
    within = _sums_over_others(x) / (len(x) - 1)
    across = _row_sums(x, y) / len(y)
    among = _sums_over_others(y).mean() / (len(y) - 1)
    influence = 2 * (within - within.mean()) - 2 * (across - across.mean())
    return Distance(float(within.mean() + among - 2 * across.mean()), influence)


def _row_sums(x: Tensor, y: Tensor, rows: int = 1000) -> Tensor:
    return torch.cat([kernel(part, y).sum(dim=1) for part in x.split(rows)])


def _sums_over_others(x: Tensor) -> Tensor:
    itself = (x.square().sum(dim=1) / x.shape[1] + 1) ** 3
    return _row_sums(x, x) - itself
