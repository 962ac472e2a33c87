"""Images as uint8 and as what a denoiser sees."""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [...] in 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] to uint8, rounded to nearest, values outside the range clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
