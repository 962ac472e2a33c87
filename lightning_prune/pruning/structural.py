"""Surgery on width groups: really smaller tensors in an otherwise untouched network.

A slim network is a copy whose tensors are the dense network's own wherever nothing was cut, so any number of them
hold what they share once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.protocols import InputError, WidthCut, WidthGroup


@dataclass(frozen=True)
class Width:
    """What stays of a group, and the weights of its output layer that go with it.

    Attributes:
        kept: numbers of the units that stay, ascending, at least one.
        weight: weight of the output layer on the columns that stay [m, kept * columns]; None cuts the dense one.
        bias: bias of the output layer [m]; None leaves it.
    """

    kept: tuple[int, ...]
    weight: Tensor | None = None
    bias: Tensor | None = None


def slim(network: nn.Module, groups: Sequence[WidthGroup], widths: Mapping[str, Width]) -> nn.Module:
    """A network of the given widths, by group name; groups left out keep all their units and are shared.

    Raises:
        InputError: an unknown group, or one that would keep nothing.
    """
    by_name = {group.name: group for group in groups}
    for name in widths.keys() - by_name.keys():
        raise InputError(f"pruning: {name}: no width group of that name")
    # Every tensor is handed to the copy as it is; those that are cut are replaced in it.
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copy = deepcopy(network, shared)
    for name, width in widths.items():
        _cut(copy, by_name[name], width)
    return copy


def channel_indices(kept: Sequence[int], channels: int, units: int, repeats: int = 1) -> Tensor:
    """Channels of the units that stay, in each of `repeats` halves [len(kept) * channels * repeats]."""
    inside = (torch.tensor(list(kept))[:, None] * channels + torch.arange(channels)).flatten()
    return torch.cat([inside + half * units * channels for half in range(repeats)])


def _cut(network: nn.Module, group: WidthGroup, width: Width) -> None:
    if not width.kept or not set(width.kept) <= set(range(group.units)):
        raise InputError(f"pruning: {group.name} of {group.units} units cannot keep {list(width.kept)}")
    output = network.get_submodule(group.output)
    if len(width.kept) < group.units:
        for cut in group.cuts:
            owner, _, name = cut.parameter.rpartition(".")
            _replace(
                network.get_submodule(owner), name, _sliced(network.get_parameter(cut.parameter), group, cut, width)
            )
            _describe(network.get_submodule(owner), len(width.kept))
        _describe(network.get_submodule(group.name), len(width.kept))
    if width.weight is not None:
        dense = output.get_parameter("weight")
        _replace(output, "weight", width.weight.to(dense).reshape(len(dense), -1, *dense.shape[2:]))
    if width.bias is not None:
        _replace(output, "bias", width.bias.to(output.get_parameter("weight")))


def _sliced(parameter: Tensor, group: WidthGroup, cut: WidthCut, width: Width) -> Tensor:
    indices = channel_indices(width.kept, group.channels, group.units, cut.repeats)
    return parameter.detach().index_select(cut.dim, indices.to(parameter.device))


def _replace(owner: nn.Module, name: str, tensor: Tensor) -> None:
    old = owner.get_parameter(name) if owner._parameters.get(name) is not None else None
    keeps_gradient = old is None or old.requires_grad
    owner.register_parameter(name, nn.Parameter(tensor.detach().contiguous(), requires_grad=keeps_gradient))


def _describe(module: nn.Module, units: int) -> None:
    """Bring the attributes of a module in line with its tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups, module.num_channels = units, len(weight) if weight is not None else module.num_channels
    elif hasattr(module, "to_q"):
        attention: Any = module
        attention.heads = attention.sliceable_head_dim = units
        attention.inner_dim = attention.inner_kv_dim = attention.to_q.weight.shape[0]


@contextmanager
def masked(network: nn.Module, group: WidthGroup, width: Width) -> Iterator[None]:
    """For a while the network computes as if it were cut, in its dense shape: columns that go are zero."""
    output = network.get_submodule(group.output)
    weight = output.get_parameter("weight")
    bias = output._parameters.get("bias")
    before, bias_before = weight.data, None if bias is None else bias.data
    columns = channel_indices(width.kept, group.columns, group.units).to(weight.device)
    dense = torch.zeros_like(before).flatten(1)
    kept = before.flatten(1)[:, columns] if width.weight is None else width.weight.to(dense)
    dense[:, columns] = kept
    weight.data = dense.view_as(before)
    if bias is not None and width.bias is not None:
        bias.data = width.bias.to(before)
    try:
        yield
    finally:
        weight.data = before
        if bias is not None and bias_before is not None:
            bias.data = bias_before
