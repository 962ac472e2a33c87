"""Refitting a slim network's layers once more, in the order they run, on what they really read.

Layers that are refitted one by one on the inputs of the dense network know nothing of the errors before them. Here
each layer that was cut is refitted when its turn comes, on its inputs in the slim network, to the outputs that the
dense network's layer has for the same samples:

    W <- W + (Y - X W^T)^T X (X^T X + m I)^-1

which draws towards the weights it had. Least squares give outputs less power than the dense layer's, by exactly what
they cannot explain; over the steps of a sampling run this becomes a loss of contrast and detail. `match_power` scales
the weights so that outputs vary as much as the dense layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.protocols import WidthGroup
from lightning_prune.pruning.curvature import rows_read
from lightning_prune.pruning.obs import Layer


@torch.no_grad()
def recalibrate(
    slim: nn.Module,
    run: Callable[[], object],
    dense: nn.Module,
    run_dense: Callable[[], object],
    groups: Sequence[WidthGroup],
    damping: float = 1e-3,
    match_power: bool = True,
) -> None:
    """Refit the output layers of `groups` in `slim`, weights and biases, in one call of it.

    What a dense layer gives is computed anew when its counterpart's turn comes, so no more than one layer's outputs
    are held.

    Args:
        slim: the slim network; the layers get tensors of their own.
        run: calls it on the samples.
        dense: the network it was cut from.
        run_dense: calls that on the same samples.
        groups: the groups that were cut.
        damping: m, relative to the mean diagonal of the second moments.
        match_power: scale outputs to the variance of the dense layer's.
    """

    def refit(group: WidthGroup) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            wanted = _outputs(dense.get_submodule(group.output), run_dense)
            _refit(layer, rows_read(layer, args[0]).flatten(0, 1).float(), wanted, damping, match_power, group.output)

        return hook

    handles = [slim.get_submodule(group.output).register_forward_pre_hook(refit(group)) for group in groups]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


class _ReachedError(Exception):
    """A network is left as soon as it has computed the layer that was asked for."""


def _outputs(layer: nn.Module, run: Callable[[], object]) -> Tensor:
    """Rows [samples * positions, m] that a layer gives in a call of its network."""
    found: list[Tensor] = []

    def leave(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.append(output.movedim(1, -1).flatten(0, -2) if isinstance(layer, nn.Conv2d) else output.flatten(0, -2))
        raise _ReachedError

    handle = layer.register_forward_hook(leave)
    try:
        with suppress(_ReachedError):
            run()
    finally:
        handle.remove()
    return found[0].float()


def _refit(layer: nn.Module, x: Tensor, wanted: Tensor, damping: float, match_power: bool, name: str) -> None:
    """Refit one layer to the outputs `wanted` [rows, m] for the inputs `x` [rows, n]."""
    weight: Tensor = layer.get_parameter("weight")
    old_bias = layer._parameters.get("bias")
    bias = weight.new_zeros(len(weight)) if old_bias is None else old_bias
    flat = torch.cat([weight.flatten(1), bias[:, None]], 1).float()
    rows = torch.cat([x, x.new_ones(len(x), 1)], 1)
    if old_bias is None:
        rows[:, -1] = 0
    moments, across = (rows.T @ rows).double().cpu(), (rows.T @ (wanted - rows @ flat.T)).double().cpu()
    damped = Layer.of(flat.cpu(), moments, damping, name).hessian
    flat = flat + torch.cholesky_solve(across, torch.linalg.cholesky(damped)).T.to(flat)
    if match_power:
        flat = _with_power_of(wanted, rows, flat, old_bias is not None)
    layer.register_parameter("weight", _parameter(flat[:, :-1].reshape(weight.shape), weight))
    if old_bias is not None:
        layer.register_parameter("bias", _parameter(flat[:, -1], old_bias))


def _with_power_of(wanted: Tensor, rows: Tensor, flat: Tensor, has_bias: bool) -> Tensor:
    """The weights [m, n + 1] scaled so that outputs vary as much as `wanted`; means stay where there is a bias."""
    found = rows @ flat.T
    power, aim = ((y - y.mean(0)).square().mean() for y in (found, wanted))
    if power <= 0:
        return flat
    scaled = flat * (aim / power).sqrt()
    if has_bias:
        scaled[:, -1] += wanted.mean(0) - (rows @ scaled.T).mean(0)
    return scaled


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like.dtype).contiguous(), requires_grad=like.requires_grad)
