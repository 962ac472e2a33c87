"""How far pruned samples are from those of the dense network, drawn from the same noise."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d

ConsistencyLoss = Literal["mse", "l1", "ssim", "ssim+l1"]
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # those of images of unit range, as published, whatever the range is


def consistency(pruned: Tensor, dense: Tensor, loss: ConsistencyLoss) -> Tensor:
    """The loss of samples [B, C, H, W], a mean over the batch, in float32."""
    pruned, dense = pruned.float(), dense.float()
    found = pruned.new_zeros(())
    if "mse" in loss:
        found = found + (pruned - dense).square().mean()
    if "l1" in loss:
        found = found + (pruned - dense).abs().mean()
    if "ssim" in loss:
        found = found + 1 - structural_similarity(pruned, dense)
    return found


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM (Wang et al. 2004) with a Gaussian window of 11 pixels and zeros around the image."""
    position = torch.arange(_WINDOW, device=a.device, dtype=a.dtype) - _WINDOW // 2
    line = torch.exp(-(position**2) / (2 * _SIGMA**2))
    line = line / line.sum()
    channels = a.shape[1]
    window = torch.outer(line, line).expand(channels, 1, _WINDOW, _WINDOW)

    def mean(x: Tensor) -> Tensor:
        return conv2d(x, window, padding=_WINDOW // 2, groups=channels)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    return (similarity / ((mean_a**2 + mean_b**2 + _C1) * (variance_a + variance_b + _C2))).mean()
