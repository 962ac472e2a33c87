"""Gates in a network: parts that compute, or give what they gave last.

A gated part is the stock diffusers module with its class swapped, as masked layers are: names, weights and the
network's own forward stay as they are. What parts store between steps is in the `Gating` they share, so a step can be
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

from lightning_prune.blocks import BlockGraph, CacheMode, Reuse, Row
from lightning_prune.diffusion.recall import Slot, Value, blended, read, store

Network = TypeVar("Network", bound=nn.Module)


class Gating:
    """What the gated parts of one network share.

    Attributes:
        reuse: what skipped parts give; see `recall`.
        stores: blocks whose values are stored, as a later step reads them; None stores all.
        keep: None computes everything and stores nothing. A row of bools computes those blocks and no others. A
            tensor [N] or [B, N] computes everything and blends it with what is stored, gates 1 taking the fresh
            value; a batch of several times B, as guidance makes, repeats it.
        commit: with blended gates, how far a sample [B] stores what it computes at this step.
        clock: where in the trajectory every sample [B] is; see `Process.clock`.
        slots: what every block has stored; None before its first time.
        checkpoint: recompute every part in the backward pass instead of storing what it computed.
    """

    def __init__(self, blocks: int, reuse: Reuse = "last") -> None:
        self.reuse: Reuse = reuse
        self.stores: Row | None = None
        self.keep: Row | Tensor | None = None
        self.commit: Tensor | None = None
        self.clock = torch.zeros(())
        self.slots: list[Slot] = [None] * blocks
        self.checkpoint = False

    def step(
        self,
        call: Callable[[], Any],
        keep: Row | Tensor,
        slots: list[Slot],
        clock: Tensor,
        commit: Tensor | None = None,
        stores: Row | None = None,
    ) -> tuple[Any, list[Slot]]:
        """Run `call` with these gates and stored values; what it returns, and the values stored since."""
        self.keep, self.slots, self.clock, self.commit, self.stores = keep, list(slots), clock, commit, stores
        output = call()
        found, self.keep, self.slots, self.commit, self.stores = self.slots, None, [None] * len(slots), None, None
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
        if keep is None or not self._last or not self._stores():
            return output
        return self._computed(output, _hidden(args, kwargs), keep)

    def _stores(self) -> bool:
        stores = self._gating.stores
        return stores is None or stores[self._block]

    def _skipped(self, hidden: Tensor) -> Value:
        if not self._last:
            return (hidden,) if self._returns_tuple else hidden
        stored = read(self._gating.slots[self._block], self._gating.clock)
        return hidden + stored if self._residual else stored

    def _computed(self, output: Value, hidden: Tensor, keep: Row | Tensor) -> Value:
        gating, block = self._gating, self._block
        fresh = output - hidden if self._residual else output
        slot = gating.slots[block]
        if not isinstance(keep, Tensor) or slot is None:
            gating.slots[block] = store(gating.reuse, slot, fresh, gating.clock)
            return output
        gate = keep[..., block]
        taken = gate if gating.commit is None else gate * gating.commit
        gating.slots[block] = store(gating.reuse, slot, fresh, gating.clock, taken)
        stored = read(slot, gating.clock)
        # The sum of input and increment rounds differently from the output; the latter is what inference has.
        return blended(gate, output, hidden + stored if self._residual else stored)


def install(network: nn.Module, graph: BlockGraph, mode: CacheMode, reuse: Reuse = "last") -> Gating:
    """Gate the blocks of a network in place; `remove` undoes it."""
    graph.in_mode(mode)
    gating = Gating(len(graph), reuse)
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
    """A copy with modules of its own and the very same parameters and buffers, wherever these are moved later."""
    # Moving a module replaces its buffers, and on some devices its parameters, in the tables that hold them.
    tables = [table for module in network.modules() for table in (module._parameters, module._buffers)]
    tensors = [*network.parameters(), *network.buffers()]
    return deepcopy(network, {id(shared): shared for shared in (*tables, *tensors)})


@cache
def _gated_class(stock: type[nn.Module]) -> type[nn.Module]:
    return type(f"Gated{stock.__name__}", (GatedPart, stock), {})


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")
