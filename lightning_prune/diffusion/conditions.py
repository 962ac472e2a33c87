"""Conditions: class labels [B], or for text a mapping of tensors, batch first. Only networks look inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# A Tensor or a Mapping[str, Tensor]; each family knows which, and code that is for all families does not care.
Condition = Any


def stack(first: Condition, second: Condition) -> Condition:
    """Two conditions of one kind as one batch."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    return {name: torch.cat([value, second[name]]) for name, value in first.items()}


def rows_of(cond: Condition, index: Tensor | slice) -> Condition:
    """Some rows of a condition."""
    if isinstance(cond, Tensor):
        return cond[index]
    return {name: value[index] for name, value in cond.items()}


def move(cond: Condition, device: torch.device | str) -> Condition:
    """The condition on `device`."""
    if isinstance(cond, Tensor):
        return cond.to(device)
    return {name: value.to(device) for name, value in cond.items()}


def replace(cond: Condition, where: Tensor, other: Condition) -> Condition:
    """`cond` with the rows of `other` at `where` (bool [B])."""
    if isinstance(cond, Tensor):
        return torch.where(where.view(-1, *[1] * (cond.ndim - 1)), other, cond)
    return {
        name: torch.where(where.view(-1, *[1] * (value.ndim - 1)), other[name], value) for name, value in cond.items()
    }
