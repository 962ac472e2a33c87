"""Checks on sets of features, shared by every measure computed from them."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from lightning_prune.protocols import InputError


def check_features(features: Tensor, reference: Tensor | None = None) -> None:
    """Raise `InputError` unless `features` [N, D] are finite and N >= 2, and so is a `reference` [M, D] to them."""
    for found in (features,) if reference is None else (features, reference):
        if found.dim() != 2 or len(found) < 2:
            raise InputError(f"features: expected [at least two samples, D], got {list(found.shape)}")
        if not torch.isfinite(found).all():
            raise InputError("features are not finite: the images they come from are not")
    if reference is not None and features.shape[1] != reference.shape[1]:
        raise InputError(f"features: {features.shape[1]} dimensions against {reference.shape[1]} of the reference")


def rank_deficient(samples: int, dimensions: int) -> bool:
    """Whether `samples` are too few for a covariance of full rank; theirs has rank `samples` - 1 at most."""
    return samples <= dimensions


def warn_if_rank_deficient(metric: str, samples: int, dimensions: int) -> bool:
    """`rank_deficient`, with a warning the first time it is so for `metric`."""
    deficient = rank_deficient(samples, dimensions)
    if deficient:
        _warn_once(metric, samples, dimensions)
    return deficient


def _warn_once(metric: str, samples: int, dimensions: int) -> None:
    if metric not in _warned():
        _warned().add(metric)
        warnings.warn(
            f"{metric}: {samples} samples for {dimensions} dimensions: the covariance is rank deficient and the "
            "value biased upwards; compare it at equal counts only",
            stacklevel=3,
        )


@functools.cache
def _warned() -> set[str]:
    return set()
