"""The Frechet distance between two sets of features, with an interval.

    FD = |mu - mu_r|^2 + tr(Sigma + Sigma_r - 2 (Sigma Sigma_r)^(1/2))        (Dowson and Landau 1982)

All moments are float64. The distance of n samples is biased upwards by a term of order D/n, so values of different
counts do not compare; the interval is one of the expected distance at that count.

The interval is the infinitesimal jackknife's (Jaeckel 1972; Efron 1982): FD is a smooth function of the sample's mean
and covariance, so each sample has a first-order influence on it, and the influences' standard deviation over sqrt(n)
is the standard error that a bootstrap estimates by resampling. It is deterministic and, between two models sampled
with equal seeds, paired for free: subtract influences sample by sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.metrics.features import check_features
from lightning_prune.protocols import InputError

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of features in float64, and the number of samples behind them."""

    mean: Tensor
    covariance: Tensor
    samples: int

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of `features` [N, D]; the covariance is unbiased.

        Raises:
            InputError: fewer than two samples, or features that are not finite.
        """
        check_features(features)
        features = features.double()
        return cls(features.mean(dim=0), features.T.cov(), len(features))


@dataclass(frozen=True)
class Distance:
    """A distance with its 95 % interval and each sample's influence [N] on it."""

    value: float
    influence: Tensor

    @property
    def standard_error(self) -> float:
        return float(self.influence.std()) / math.sqrt(len(self.influence))

    @property
    def low(self) -> float:
        return self.value - Z95 * self.standard_error

    @property
    def high(self) -> float:
        return self.value + Z95 * self.standard_error


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and its pseudo-inverse of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp(min=0).sqrt()
    cutoff = root.max() * len(root) * torch.finfo(root.dtype).eps ** 0.5
    inverse = torch.where(root > cutoff, 1 / root.clamp(min=cutoff), torch.zeros_like(root))
    return vectors * root @ vectors.T, vectors * inverse @ vectors.T


def frechet_distance(moments: Moments, reference: Moments) -> float:
    """The distance between two Gaussians with these moments."""
    reference_root, _ = _root(reference.covariance)
    cross = torch.linalg.eigvalsh(reference_root @ moments.covariance @ reference_root).clamp(min=0).sqrt().sum()
    shift = (moments.mean - reference.mean).square().sum()
    return float(shift + moments.covariance.trace() + reference.covariance.trace() - 2 * cross)


def distance(features: Tensor, reference: Moments) -> Distance:
    """The distance of `features` [N, D] from a reference, with each sample's influence on it."""
    moments = Moments.of(features)
    return Distance(frechet_distance(moments, reference), influence(features, moments, reference))


def influence(features: Tensor, moments: Moments, reference: Moments) -> Tensor:
    """First-order effect [N] of each sample on the distance, of mean zero.

    With A = Sigma_r^(1/2), the gradient with respect to Sigma is G = I - A (A Sigma A)^(-1/2) A, so sample i with
    d = x_i - mu contributes 2 (mu - mu_r).d + d'G d - tr(G Sigma).
    """
    reference_root, _ = _root(reference.covariance)
    _, inverse = _root(reference_root @ moments.covariance @ reference_root)
    gradient = torch.eye(len(inverse), dtype=inverse.dtype) - reference_root @ inverse @ reference_root
    centred = features.double() - moments.mean
    linear = 2 * centred @ (moments.mean - reference.mean)
    quadratic = ((centred @ gradient) * centred).sum(dim=1)
    return linear + quadratic - (quadratic.mean())


def paired_difference(a: Distance, b: Distance) -> Distance:
    """a - b for two models sampled with equal ids and seeds; its interval knows how far they go together.

    Raises:
        InputError: the two do not have the same number of samples, so nothing pairs them.
    """
    if len(a.influence) != len(b.influence):
        raise InputError(f"paired difference: {len(a.influence)} samples against {len(b.influence)}")
    return Distance(a.value - b.value, a.influence - b.influence)


def precision_recall(features: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall by k-nearest-neighbour balls (Kynkaanniemi et al. 2019, equation 1)."""

    def covered(points: Tensor, support: Tensor) -> float:
        radius = torch.cdist(support, support).kthvalue(k + 1, dim=1).values
        inside = torch.cdist(points, support) <= radius
        return float(inside.any(dim=1).float().mean())

    features, reference = features.double(), reference.double()
    return covered(features, reference), covered(reference, features)
