"""Second moments of what layers read, per bin of the trajectory, streamed over calibration batches.

One pass of the dense network fills all of them. They may live in a memory-mapped file, so that what has to be in memory
at a time is one layer's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.protocols import InputError, WidthGroup

_ROWS_AT_ONCE = 1 << 14


class Curvature:
    """H = sum of w x x^T over the rows x that the output layer of each group reads, by bin; float32.

    The last row and column belong to a constant input 1, through which a bias can be refitted. Convolutions read a
    row per output position: the channels under their kernel.

    Args:
        network: the dense network.
        groups: its width groups.
        bins: number of parts of the trajectory to keep apart.
        folder: where to map the sums from; null keeps them in memory.
    """

    def __init__(self, network: nn.Module, groups: Sequence[WidthGroup], bins: int, folder: Path | None = None) -> None:
        self.network, self.groups, self.bins = network, list(groups), bins
        self.folder = folder
        self.sums = self._zeros()
        self.rows = torch.zeros(bins, len(self.groups), dtype=torch.float64)

    def _zeros(self) -> dict[str, Tensor]:
        """Sums [bins, n, n] by group, one store for all."""
        sizes = {g.name: g.units * g.columns + 1 for g in self.groups}
        parts = mapped(self.bins * sum(n * n for n in sizes.values()), self.folder).split(
            [self.bins * n * n for n in sizes.values()]
        )
        return {name: part.view(self.bins, n, n) for (name, n), part in zip(sizes.items(), parts, strict=True)}

    @contextmanager
    def collecting(self, bin_of: Tensor, weights: Tensor | None = None) -> Iterator[None]:
        """Calls of the network are added to the sums.

        Args:
            bin_of: bin of each sample of the batch [B].
            weights: weight of each sample's rows [B]; 1 by default.
        """
        with ExitStack() as stack:
            for number, group in enumerate(self.groups):
                hook = partial(self._add, number, bin_of, weights)
                stack.callback(self.network.get_submodule(group.output).register_forward_pre_hook(hook).remove)
            yield

    def _add(
        self, number: int, bin_of: Tensor, weights: Tensor | None, layer: nn.Module, args: tuple[Any, ...]
    ) -> None:
        group, x = self.groups[number], args[0].detach().float()
        for index in bin_of.unique().tolist():
            chosen = torch.nonzero(bin_of == index).flatten().to(x.device)
            scale = None if weights is None else weights.to(x)[chosen]
            sums = self.sums[group.name][index]
            # Sums of products in half precision are no second moments: they have negative eigenvalues.
            with torch.autocast(x.device.type, enabled=False):
                self.rows[index, number] += _accumulate(sums, layer, x[chosen], scale)

    def mean(self, group: WidthGroup, steps: Sequence[float]) -> Tensor:
        """H per row, averaged over bins with weights `steps` [bins]; float64, on the CPU.

        Raises:
            InputError: a bin that counts but has no rows.
        """
        number, total = self.groups.index(group), float(sum(steps))
        sums = self.sums[group.name]
        mean = torch.zeros(sums.shape[1:], dtype=torch.float64)
        for index, weight in enumerate(steps):
            rows = float(self.rows[index, number])
            if weight > 0 and rows == 0:
                raise InputError("calibration: a stage has seen no sample; raise trainer.limit_train_batches")
            if weight > 0:
                mean += sums[index].double() * (weight / total / rows)
        return mean

    def sum_over(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Sum over processes in place, tensor by tensor; `reduce` does it to one, which it may overwrite."""
        for tensor in (*self.sums.values(), self.rows):
            tensor.copy_(reduce(tensor))

    def state(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
        """What a checkpoint holds: the sums themselves, or with `reduce` copies summed over processes.

        Copies lie where the sums do.
        """
        if reduce is None:
            return {"sums": dict(self.sums), "rows": self.rows}
        copies = self._zeros()
        for name, sums in self.sums.items():
            copies[name].copy_(reduce(copies[name].copy_(sums)))
        return {"sums": copies, "rows": reduce(self.rows.clone())}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a state. Raises `InputError` for one of another network or other bins."""
        for name, sums in self.sums.items():
            if name not in state["sums"] or state["sums"][name].shape != sums.shape:
                raise InputError(f"ckpt_path: statistics of {name} do not fit this network and these stages")
            sums.copy_(state["sums"][name])
        self.rows.copy_(state["rows"])


def mapped(size: int, folder: Path | None) -> Tensor:
    """Floats [size] in a file of `folder` that goes with the process; zeros in memory without one."""
    if folder is None:
        return torch.zeros(size)
    folder.mkdir(parents=True, exist_ok=True)
    # Nobody else finds the file, and it goes with the process.
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".statistics-") as file:
        _reserve(file.fileno(), 4 * size, folder)
        return torch.from_file(file.name, shared=True, size=size)


def _reserve(file: int, size: int, folder: Path) -> None:
    """Take the room now: a mapped file that a full disk cannot hold ends the process without a word."""
    if not hasattr(os, "posix_fallocate"):  # as on macOS
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        raise InputError(f"{folder}: no room for {size / 1e9:.2f} GB of statistics: {error.strerror}") from error


def _accumulate(sums: Tensor, layer: nn.Module, x: Tensor, scale: Tensor | None) -> int:
    """Add the rows of samples `x`, a few samples at a time; returns how many rows they are."""
    total = 0
    per_sample = max(1, x[0].numel() // max(1, x.shape[1] if x.ndim == 4 else x.shape[-1]))
    for part in torch.arange(len(x)).split(max(1, _ROWS_AT_ONCE // per_sample)):
        rows = rows_read(layer, x[part])
        if scale is not None:
            rows = rows * scale[part].sqrt().view(-1, 1, 1)
        ones = rows.new_ones(*rows.shape[:2], 1)
        if scale is not None:
            ones = ones * scale[part].sqrt().view(-1, 1, 1)
        flat = torch.cat([rows, ones], -1).flatten(0, 1)
        sums += (flat.T @ flat).to(sums.device)
        total += len(flat)
    return total


def rows_read(layer: nn.Module, x: Tensor) -> Tensor:
    """Rows [B, positions, columns] that a layer reads of its input."""
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str):
            raise InputError("pruning: convolutions with padding by name are not supported")
        return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
    return x.reshape(len(x), -1, x.shape[-1])
