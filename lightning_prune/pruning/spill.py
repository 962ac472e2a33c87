"""Tensors put away in a file while others are computed."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Place = Any  # where a tensor lies


class Spill:
    """Tensors in one file that nobody else finds and that goes with the object, or in memory.

    Nothing is left in memory of a tensor in the file. That is more than thrift: small things that live long, laid
    between activations that come and go, keep the C library from using the memory of the latter again. A mapped file
    for each tensor, a few hundred of them, made a process of 40 MB take 170 (glibc 2.36).

    Args:
        folder: where to put the file; null keeps tensors in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file: Any = None
        self._end = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".spill-")  # noqa: SIM115 - closed below
            weakref.finalize(self, self._file.close)

    def put(self, tensor: Tensor) -> Place:
        """Put a tensor away, to be had again by the place that is returned."""
        if self._file is None:
            return tensor.detach().to("cpu", copy=True)
        # Later sums depend on the layout of what they are taken over, in their last bits.
        layout = tensor.dim_order()
        place = self._end, tensor.shape, layout, tensor.dtype
        self._file.seek(self._end)
        self._end += self._file.write(_bytes(tensor.detach().cpu().permute(layout)))
        return place

    def get(self, place: Place) -> Tensor:
        """The tensor of a place, on the CPU."""
        if self._file is None:
            kept: Tensor = place
            return kept
        start, shape, layout, dtype = place
        found = torch.empty_permuted(shape, layout, dtype=dtype)
        self._file.seek(start)
        self._file.readinto(_bytes(found.permute(layout)))
        return found


def _bytes(tensor: Tensor) -> Any:
    """Those of a tensor itself where it is contiguous, or of a copy."""
    return tensor.flatten().view(torch.uint8).numpy()
