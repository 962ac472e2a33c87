"""How far a pruned network's images are from those the dense one draws from the same noise, image by image.

A distribution distance asks whether the images are as good; drift asks whether they are the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_prune.metrics.frechet import Z95
from lightning_prune.pixels import to_uint8

# Rounding to 256 levels alone has a mean squared error of 1/12: images equal after it count as that far apart.
_ROUNDING = 1 / 12


@dataclass(frozen=True)
class Drift:
    """Per-image differences [N] from the dense network's images.

    Attributes:
        psnr: peak signal-to-noise ratio in decibels, of the 8-bit images; at most 58.9, that of rounding.
        ssim: structural similarity of the 8-bit images (Wang et al. 2004), 1 for equal ones.
        mse: mean squared difference of the sampler's outputs, before rounding: of latents where it draws latents.
        lpips: perceptual distance (Zhang et al. 2018); None without its weights.
    """

    psnr: Tensor
    ssim: Tensor
    mse: Tensor
    lpips: Tensor | None = None

    def measures(self) -> dict[str, Tensor]:
        """What was measured, by name."""
        return {name: values for name, values in vars(self).items() if values is not None}

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean of each with its 95 % interval over images."""
        return {name: _mean(values) for name, values in self.measures().items()}


def drift(
    images: Tensor,
    dense: Tensor,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    latents: tuple[Tensor, Tensor] | None = None,
) -> Drift:
    """Compare images [N, C, H, W] with those of the dense network for the same ids.

    `perceptual` gives LPIPS [N] of two sets of images in [-1, 1]. Where images were decoded, `latents` are what the
    sampler gave for both.
    """
    drawn, drawn_dense = latents or (images, dense)
    ours, theirs = to_uint8(images).float(), to_uint8(dense).float()
    error = (ours - theirs).square().flatten(1).mean(dim=1).clamp(min=_ROUNDING)
    ssim = structural_similarity_index_measure(ours, theirs, data_range=255.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return Drift(
        psnr=(10 * torch.log10(255**2 / error)).cpu(),
        ssim=ssim.reshape(-1).cpu(),
        mse=(drawn - drawn_dense).square().flatten(1).mean(dim=1).cpu(),
        lpips=None if perceptual is None else perceptual(images, dense).cpu(),
    )


def joined(parts: list[Drift]) -> Drift:
    """One drift of several batches'."""
    return Drift(**{name: torch.cat([part.measures()[name] for part in parts]) for name in parts[0].measures()})


def _mean(values: Tensor) -> dict[str, float]:
    mean, spread = float(values.double().mean()), float(values.double().std(correction=1)) if len(values) > 1 else 0.0
    half = Z95 * spread / math.sqrt(len(values))
    return {"value": mean, "low": mean - half, "high": mean + half}
