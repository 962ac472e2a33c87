"""Refitting a slim network's layers once more, in the order they run, on what they really read.

Layers that are refitted one by one on the inputs of the dense network know nothing of the errors before them. Here
each layer that was cut is refitted when its turn comes, on its inputs X in the slim network, to the outputs Y that the
dense network's layer has for the same samples:

    W <- W + (Y - X W^T)^T X (X^T X + m I)^-1

which draws towards the weights it had. Least squares shrink what they predict, by exactly what they cannot explain;
over the steps of a sampling run this becomes a loss of contrast and detail. So outputs are scaled: to follow the dense
layer's one to one ("gain": what is unexplained comes on top and later steps remove it, as they do any noise), or to
vary as much as they do ("power").

Samples are seen a batch at a time, once by the dense network. The slim one goes as far as each layer in turn, and
what comes before the part that the layer lies in is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.protocols import WidthGroup
from lightning_prune.pruning.curvature import rows_read
from lightning_prune.pruning.obs import Layer
from lightning_prune.pruning.replay import Replay
from lightning_prune.pruning.spill import Place, Spill

Run = Callable[[int], object]
Match = Literal["gain", "power", "none"]
# A layer of which little is predicted is not made loud.
_LOUDEST = 2.0


@torch.no_grad()
def recalibrate(
    slim: nn.Module,
    run: Run,
    dense: nn.Module,
    run_dense: Run,
    batches: int,
    groups: Sequence[WidthGroup],
    damping: float = 1e-3,
    match: Match = "gain",
    folder: Path | None = None,
) -> None:
    """Refit the output layers of `groups` in `slim`, weights and biases.

    Args:
        slim: the slim network; the layers get tensors of their own.
        run: calls it on a batch of the samples, by number.
        dense: the network it was cut from.
        run_dense: calls that on the same batch.
        batches: number of batches.
        groups: the groups that were cut.
        damping: m, relative to the mean diagonal of the second moments.
        match: what outputs are scaled by: to have the dense layer's "gain", its "power", or not at all.
        folder: where to keep outputs in files; null keeps them in memory.
    """
    wanted = _outputs(dense, run_dense, batches, groups, folder)
    inside = {group.output: group.name for group in groups}
    replay = Replay(slim, inside.values(), folder)

    def as_far_as(name: str, batch: int) -> None:
        with replay.until(inside[name], batch):
            run(batch)

    for name in list(wanted):
        layer = slim.get_submodule(name)
        spill, places = wanted.pop(name)
        moments = _moments(layer, partial(as_far_as, name), (spill.get(place) for place in places))
        _refit(layer, moments, damping, match, name)


class _ReachedError(Exception):
    """A network is left as soon as it has come to the layer that was asked for."""


def _outputs(
    network: nn.Module, run: Run, batches: int, groups: Sequence[WidthGroup], folder: Path | None
) -> dict[str, tuple[Spill, list[Place]]]:
    """Rows [samples * positions, m] that layers give in each batch, by layer in the order of their first call.

    Each layer's go when nobody holds its spill any more.
    """
    spills = {group.output: Spill(folder) for group in groups}
    found: dict[str, tuple[Spill, list[Place]]] = {}

    def keep(name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        rows = output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output
        spill, places = found.setdefault(name, (spills[name], []))
        places.append(spill.put(rows.reshape(-1, rows.shape[-1]).float()))

    with ExitStack() as stack:
        for group in groups:
            layer = network.get_submodule(group.output)
            stack.callback(layer.register_forward_hook(partial(keep, group.output)).remove)
        for batch in range(batches):
            run(batch)
    return found


@dataclass
class _Moments:
    """Sums over rows, float64: inputs x [n] with a 1 behind them, outputs y that are wanted, what is missing of them.

    Attributes:
        inputs: (x, 1) (x, 1)^T [n + 1, n + 1].
        missing: (x, 1) (y - W x - b)^T [n + 1, m].
        total: y [m].
        square: |y|^2.
    """

    inputs: Tensor
    missing: Tensor
    total: Tensor
    square: float = 0.0

    @property
    def rows(self) -> float:
        return float(self.inputs[-1, -1])

    @property
    def wanted_variance(self) -> float:
        """Summed over outputs."""
        return self.square / self.rows - float((self.total / self.rows).square().sum())

    def variance(self, weight: Tensor) -> float:
        """Of the outputs for weights [m, n + 1], summed over outputs."""
        mean = weight @ self.inputs[-1] / self.rows
        return float(((weight @ self.inputs) * weight).sum()) / self.rows - float(mean.square().sum())

    def covariance(self, weight: Tensor, before: Tensor) -> float:
        """Of these outputs with those that are wanted; `before` are the weights that `missing` is of."""
        crossed = self.missing + self.inputs @ before.T
        means = (weight @ self.inputs[-1]) @ self.total / self.rows**2
        return float((weight * crossed.T).sum()) / self.rows - float(means)

    def scale(self, weight: Tensor, before: Tensor, match: Match) -> float:
        """What to multiply weights by, so that outputs have the gain or the power of those that are wanted."""
        if match == "none":
            return 1.0
        wanted = self.wanted_variance
        had = self.covariance(weight, before) if match == "gain" else self.variance(weight)
        if had <= 0 or wanted <= 0:
            return 1.0
        return min(_LOUDEST, wanted / had if match == "gain" else (wanted / had) ** 0.5)


def _moments(layer: nn.Module, run: Run, wanted: Iterable[Tensor]) -> _Moments:
    """Of what a layer reads in each batch, and of what is wanted of it."""
    flat = _flat(layer)
    outputs, n = flat.shape
    zeros = partial(torch.zeros, dtype=torch.float64)
    found = _Moments(zeros(n, n), zeros(n, outputs), zeros(outputs))
    for batch, rows in enumerate(wanted):
        x = _inputs(layer, run, batch)
        y, x = rows.to(x), torch.cat([x, x.new_ones(len(x), 1)], 1)
        found.inputs += (x.T @ x).double().cpu()
        found.missing += (x.T @ (y - x @ flat.T)).double().cpu()
        found.total += y.double().sum(0).cpu()
        found.square += float(y.double().square().sum())
    return found


def _inputs(layer: nn.Module, run: Run, batch: int) -> Tensor:
    """Rows [samples * positions, n] that a layer reads in a call of its network, which it ends."""
    found: list[Tensor] = []

    def leave(layer: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(rows_read(layer, args[0]).flatten(0, 1).float())
        raise _ReachedError

    handle = layer.register_forward_pre_hook(leave)
    try:
        with suppress(_ReachedError):
            run(batch)
    finally:
        handle.remove()
    return found[0]


def _flat(layer: nn.Module) -> Tensor:
    """Weight and bias [m, n + 1]; a bias of zeros where there is none."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    column = weight.new_zeros(len(weight)) if bias is None else bias
    return torch.cat([weight.flatten(1), column[:, None]], 1).float()


def _refit(layer: nn.Module, moments: _Moments, damping: float, match: Match, name: str) -> None:
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    before = _flat(layer).double().cpu()
    free = slice(None) if bias is not None else slice(-1)
    damped = Layer.of(before[:, free], moments.inputs[free, free], damping, name).hessian
    flat = before.clone()
    flat[:, free] += torch.cholesky_solve(moments.missing[free], torch.linalg.cholesky(damped)).T
    flat *= moments.scale(flat, before, match)
    if bias is not None and match != "none":
        flat[:, -1] += (moments.total - flat @ moments.inputs[-1]) / moments.rows
    layer.register_parameter("weight", _parameter(flat[:, :-1].reshape(weight.shape), weight))
    if bias is not None:
        layer.register_parameter("bias", _parameter(flat[:, -1], bias))


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like).contiguous(), requires_grad=like.requires_grad)
