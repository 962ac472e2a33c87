"""What is stored of a value that is skipped later, and what is read in its place.

A stored value is the last one computed ("last"), or the last two and when they were ("linear"), from which a line is
drawn in half the log signal-to-noise ratio, the axis along which predictions move most evenly (Lu et al. 2022,
DPM-Solver++; for features Liu et al. 2025, TaylorSeer, first order).

Values are tensors [B, ...], or nested tuples of tensors in which one tensor may occur twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_prune.blocks import Reuse

Value = Any  # a tensor, or a nested tuple of tensors
Slot = Any  # None, (last,), or (last, the one before, clocks of the two [B, 2])
# Lines are not drawn further than this many times the distance of the two points they go through.
_REACH = 3.0


def store(reuse: Reuse, slot: Slot, fresh: Value, clock: Tensor, gate: Tensor | None = None) -> Slot:
    """What is stored once `fresh` is computed at `clock` [B]; with a gate [] or [B], to that degree.

    No tensor is in two places, or in the slots of two blocks: which are the same would depend on the steps before, and
    the compiler makes a graph for every way in which its inputs are.
    """
    if reuse == "last":
        after: Slot = (fresh,)
    elif slot is None:  # with nothing before, the line is flat
        after = (fresh, combined(lambda one, _: one.clone(), fresh, fresh), torch.stack([clock, clock - 1], dim=-1))
    else:
        after = (fresh, slot[0], torch.stack([clock, slot[2][:, 0]], dim=-1))
    return after if gate is None or slot is None else blended(gate, after, slot)


def read(slot: Slot, clock: Tensor) -> Value:
    """What stands for the value at `clock` [B]."""
    if len(slot) == 1:
        return slot[0]
    last, before, clocks = slot
    then, earlier = clocks.unbind(dim=-1)
    gap = then - earlier
    still = gap == 0  # a solver that visits a timestep twice
    share = ((clock - then) / torch.where(still, 1, gap)).clamp(0, _REACH) * ~still
    return combined(lambda one, two: one + per_sample(share, one) * (one - two), last, before)


def blended(gate: Tensor, fresh: Value, stored: Value) -> Value:
    """gate * fresh + (1 - gate) * stored, tensor by tensor, for a gate [] or one of each sample."""

    def blend(one: Tensor, other: Tensor) -> Tensor:
        weight = per_sample(gate, one)
        return weight * one + (1 - weight) * other

    return combined(blend, fresh, stored)


def combined(
    call: Callable[[Tensor, Tensor], Tensor],
    one: Value,
    other: Value,
    seen: list[tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Value:
    """`call` on pairs of tensors of two values of one structure; a pair that occurs twice is computed once."""
    seen = [] if seen is None else seen
    if isinstance(one, tuple):
        return tuple(combined(call, a, b, seen) for a, b in zip(one, other, strict=True))
    for a, b, result in seen:  # by identity without its number, for which the compiler would make a graph each
        if a is one and b is other:
            return result
    seen.append((one, other, call(one, other)))
    return seen[-1][2]


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


def stored_tensors(value: Value) -> list[Tensor]:
    """The distinct tensors of stored values."""
    tensors: list[Tensor] = []
    flatten(value, tensors)
    return tensors
