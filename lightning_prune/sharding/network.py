"""Sharding a denoiser by FSDP2, and the whole network out of what processes hold. Collective: all call these."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_prune.pruning.masks import MaskedLayer
from lightning_prune.pruning.shards import full, is_spread

Network = TypeVar("Network", bound=nn.Module)


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of `module` are spread over processes."""
    return any(is_spread(p) for p in module.parameters())


def shard(network: nn.Module, mesh: Any, entered: Collection[str] = ()) -> None:
    """Spread the parameters of `network` over the processes of `mesh`, in place.

    Gathered together are those of one block, an element of a list of modules; those of every module named in
    `entered`; and at last what is in neither.
    """
    for name in entered:
        fully_shard(network.get_submodule(name), mesh=mesh)
    for name in _blocks(network):
        fully_shard(network.get_submodule(name), mesh=mesh)
    # By default the outermost stays gathered after a call, and its parameters would then be others than before it.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def _blocks(network: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the elements of the outermost lists of modules."""
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            yield from (f"{prefix}{name}.{index}" for index in range(len(child)))
        else:
            yield from _blocks(child, f"{prefix}{name}.")


@contextmanager
def entries(network: nn.Module) -> Iterator[list[str]]:
    """Collects the modules inside a block that calls of `network` enter while the block does not run.

    DiT's last layer, for one, uses the embedding inside its first block, whose weights are spread again by then.
    """
    blocks, active, found = set(_blocks(network)), list[str](), list[str]()

    def enter(name: str, *_: Any) -> None:
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        inside = any(block and (outer == block or outer.startswith(f"{block}.")) for outer in active)
        if block and not inside and name not in found:
            found.append(name)
        active.append(name)

    def leave(*_: Any) -> None:
        active.pop()

    hooks = []
    for name, module in network.named_modules():
        hooks += [module.register_forward_pre_hook(partial(enter, name)), module.register_forward_hook(leave)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def skeleton(network: Network) -> Network:
    """A copy without the weights: structure, buffers and masks' patterns, parameters on the meta device."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in network.parameters()}
    return deepcopy(network, memo)


def whole(sharded: nn.Module, structure: Network, device: torch.device) -> Network:
    """The network in one piece on every process, in a new copy of `structure`, under the patterns of `sharded` now."""
    gathered = {name: full(p).to(device) for name, p in sharded.named_parameters()}
    copy = deepcopy(structure)
    for name, parameter in list(copy.named_parameters()):
        owner, _, last = name.rpartition(".")
        setattr(copy.get_submodule(owner), last, nn.Parameter(gathered[name], parameter.requires_grad))
    copy.to(device)
    for ours, theirs in zip(sharded.modules(), copy.modules(), strict=True):
        if isinstance(ours, MaskedLayer) and isinstance(theirs, MaskedLayer):
            theirs.set_sparsity(ours.sparsity)  # the structure has the masks of the weights at its making
    return copy
