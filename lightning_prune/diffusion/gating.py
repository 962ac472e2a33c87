"""Gates in a network: parts that compute, or give what they gave last.

A gated part is the stock diffusers module with its class swapped, as masked layers are: names, weights and the
network's own forward stay as they are. What parts keep between steps is in the `Gating` they share, so a step can be
written as a function of it: a static path for the compiler, a unit for checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prune.blocks import BlockGraph, CacheMode, Row

Value = Any  # a tensor, or a nested tuple of tensors
Network = TypeVar("Network", bound=nn.Module)


class Gating:
    """What the gated parts of one network share.

    Attributes:
        keep: None computes everything and stores nothing. A row of bools computes those blocks and no others. A
            tensor [N] or [B, N] computes everything and blends it with what is stored, gates 1 taking the fresh
            value; a batch of several times B, as guidance makes, repeats it.
        slots: what every block gave last; None before its first time.
        live: which samples [B, ...] of a blended step take what it computes; gradients of the others do not flow
            into what is stored. None is all.
        checkpoint: recompute every part in the backward pass instead of storing what it computed.
    """

    def __init__(self, blocks: int) -> None:
        self.keep: Row | Tensor | None = None
        self.slots: list[Value] = [None] * blocks
        self.live: Tensor | None = None
        self.checkpoint = False

    def step(
        self, call: Callable[[], Any], keep: Row | Tensor, slots: list[Value], live: Tensor | None = None
    ) -> tuple[Any, list[Value]]:
        """Run `call` with these gates and stored values; what it returns, and the values stored since."""
        self.keep, self.slots, self.live = keep, list(slots), live
        output = call()
        found, self.keep, self.slots, self.live = self.slots, None, [None] * len(slots), None
        return output, found


class GatedPart(nn.Module):
    """A module of a block: the class of every gated module has this in front of its own."""

    _gating: Gating
    _block: int
    _last: bool  # whether its output is the block's
    _residual: bool  # whether what it adds to its input is stored, not what it gives
    _returns_tuple: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        keep = self._gating.keep
        if isinstance(keep, tuple) and not keep[self._block]:
            return self._skipped(_hidden(args, kwargs))
        if self._gating.checkpoint and torch.is_grad_enabled():
            output = checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
        else:
            output = super().forward(*args, **kwargs)
        self._returns_tuple = isinstance(output, tuple)
        if keep is None or not self._last:
            return output
        return self._computed(output, _hidden(args, kwargs), keep)

    def _skipped(self, hidden: Tensor) -> Value:
        if not self._last:
            return (hidden,) if self._returns_tuple else hidden
        stored = self._gating.slots[self._block]
        return hidden + stored if self._residual else stored

    def _computed(self, output: Value, hidden: Tensor, keep: Row | Tensor) -> Value:
        slots, block = self._gating.slots, self._block
        fresh = output - hidden if self._residual else output
        stored = slots[block]
        if not isinstance(keep, Tensor) or stored is None:
            slots[block] = fresh
            return output
        slots[block] = blended(keep[..., block], fresh, stored)
        # The sum of input and increment rounds differently from the output; the latter is what inference has.
        return blended(keep[..., block], output, hidden + self._seen(stored)) if self._residual else slots[block]

    def _seen(self, stored: Tensor) -> Tensor:
        """What is stored, detached for samples that do not take the step's result."""
        live = self._gating.live
        if live is None:
            return stored
        return torch.where(live.view(-1, *[1] * (stored.ndim - 1)), stored, stored.detach())


def install(network: nn.Module, graph: BlockGraph, mode: CacheMode) -> Gating:
    """Gate the blocks of a network in place; `remove` undoes it."""
    graph.in_mode(mode)
    gating = Gating(len(graph))
    for position, block in enumerate(graph.blocks):
        for name in block.modules:
            part: Any = network.get_submodule(name)
            stock: Any = type(part)
            part.__class__ = _gated_class(stock)
            part._gating, part._block, part._returns_tuple = gating, position, False
            part._last = name == block.modules[-1]
            part._residual = mode == "residual" and not block.increment
    return gating


def remove(network: nn.Module) -> None:
    """Take the gates out of a network; it is as it was before."""
    for part in network.modules():
        if isinstance(part, GatedPart):
            part.__class__ = type(part).__bases__[1]
            for name in ("_gating", "_block", "_returns_tuple", "_last", "_residual"):
                delattr(part, name)


def sharing_copy(network: Network) -> Network:
    """A copy with modules of its own and the very same parameters and buffers."""
    return deepcopy(network, {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]})


@cache
def _gated_class(stock: type[nn.Module]) -> type[nn.Module]:
    return type(f"Gated{stock.__name__}", (GatedPart, stock), {})


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


# Values: tensors, or nested tuples of tensors in which one tensor may occur twice


def blended(gate: Tensor, fresh: Value, stored: Value, seen: dict[int, Tensor] | None = None) -> Value:
    """gate * fresh + (1 - gate) * stored, tensor by tensor, for a gate [] or one of each sample."""
    seen = {} if seen is None else seen
    if isinstance(fresh, tuple):
        return tuple(blended(gate, f, s, seen) for f, s in zip(fresh, stored, strict=True))
    if id(fresh) not in seen:
        weight = per_sample(gate, fresh)
        seen[id(fresh)] = weight * fresh + (1 - weight) * stored
    return seen[id(fresh)]


def per_sample(gate: Tensor, like: Tensor) -> Tensor:
    """A gate [] or [B] as a factor of a tensor [k B, ...], in its type."""
    gate = gate.to(like.dtype)
    if gate.ndim == 0:
        return gate
    return gate.repeat(len(like) // len(gate)).view(-1, *[1] * (like.ndim - 1))


def flatten(value: Value, tensors: list[Tensor]) -> Any:
    """Append the distinct tensors of a value to `tensors`; the value with their positions in their place."""
    if isinstance(value, tuple | list):
        return tuple(flatten(part, tensors) for part in value)
    if value is None:
        return None
    for position, tensor in enumerate(tensors):
        if tensor is value:
            return position
    tensors.append(value)
    return len(tensors) - 1


def unflatten(positions: Any, tensors: tuple[Tensor, ...]) -> Value:
    """The inverse of `flatten`."""
    if isinstance(positions, tuple):
        return tuple(unflatten(part, tensors) for part in positions)
    return None if positions is None else tensors[positions]


def stored_elements(slots: list[Value]) -> int:
    """Elements that stored values hold, a tensor that occurs twice counted once."""
    tensors: list[Tensor] = []
    flatten(slots, tensors)
    return sum(tensor.numel() for tensor in tensors)
