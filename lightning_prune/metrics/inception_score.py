"""The Inception Score (Salimans et al. 2016), with an interval. Higher is better."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lightning_prune.metrics.features import check_features
from lightning_prune.metrics.frechet import Distance
from lightning_prune.protocols import InputError


def inception_score(logits: Tensor | None, splits: int = 10) -> Distance:
    """exp(mean_i KL(p_i || mean p)) of class scores [N, K], averaged over `splits` parts in their order.

    The interval is the infinitesimal jackknife's: within a part, sample i has the influence IS (KL_i - mean KL). More
    samples a part raise the value, so N and `splits` belong to the protocol.

    Raises:
        InputError: no class scores, scores that are not finite, or fewer than two samples a part.
    """
    if logits is None:
        raise InputError("Inception Score: these weights have no class layer (fc.weight), so there are no class scores")
    check_features(logits)
    if splits < 1 or len(logits) < 2 * splits:
        raise InputError(f"Inception Score: {len(logits)} samples do not fill {splits} splits of at least two")
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    values, influences = [], []
    for start, stop in pairwise(bounds):
        divergence = divergences(logits[start:stop])
        value = divergence.mean().exp()
        values.append(value)
        share = len(logits) / (splits * (stop - start))  # 1 unless the parts differ in size
        influences.append(share * value * (divergence - divergence.mean()))
    return Distance(float(torch.stack(values).mean()), torch.cat(influences))


def divergences(logits: Tensor) -> Tensor:
    """KL divergence [N] of each sample's classes from their mean, in float64 and nats."""
    log_p = logits.double().log_softmax(dim=1)
    p = log_p.exp()
    log_mean = p.mean(dim=0).clamp(min=torch.finfo(p.dtype).tiny).log()
    return (p * (log_p - log_mean)).sum(dim=1)
