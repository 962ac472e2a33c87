"""N:M magnitude masks: keep the n largest of every m consecutive weights along the input dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.protocols import InputError, Sparsity

_PAIRWISE_UP_TO = 8


def to_groups(weight: Tensor, m: int) -> Tensor:
    """View a Linear weight (out, in) or Conv2d weight (O, I, kh, kw) as groups (..., m) along the input dimension.

    A convolution is permuted to (O, kh, kw, I), so a group is m consecutive input channels at one output channel
    and kernel tap, the layout that 2:4 hardware would need.

    Raises:
        InputError: the input dimension is no multiple of m, so groups would straddle rows or taps.
    """
    inputs_last = weight.movedim(1, -1)
    if inputs_last.shape[-1] % m:
        raise InputError(f"input dimension {inputs_last.shape[-1]} is no multiple of {m}")
    groups: Tensor = inputs_last.unflatten(-1, (-1, m))
    return groups


def from_groups(groups: Tensor) -> Tensor:
    """Inverse of `to_groups`."""
    return groups.flatten(-2).movedim(-1, 1)


def nm_mask(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """Boolean mask of the shape of `scores` with exactly n true entries in each group of m.

    The n largest magnitudes are kept; of equal ones the lower position. Spec: Zhou et al. 2021 (SR-STE),
    section 3.1; the same axis as NVIDIA's ASP.
    """
    return largest(scores.detach().abs(), sparsity)


def largest(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """Boolean mask of the n largest of every group of m `scores`, sign included; of equal ones the lower position."""
    groups = to_groups(scores, sparsity.m)
    if sparsity.is_dense:
        return torch.ones_like(scores, dtype=torch.bool)
    keep = _keep_by_comparison if sparsity.m <= _PAIRWISE_UP_TO else _keep_by_sorting
    return from_groups(keep(groups, sparsity.n))


def _keep_by_comparison(groups: Tensor, n: int) -> Tensor:
    """Rank each entry by counting those that beat it: faster than sorting many tiny groups."""
    entries = groups.unbind(-1)
    beaten_by = [torch.zeros_like(entries[0], dtype=torch.int8) for _ in entries]
    for low in range(len(entries)):
        for high in range(low + 1, len(entries)):
            low_wins = entries[low] >= entries[high]
            beaten_by[high] += low_wins
            beaten_by[low] += ~low_wins
    return torch.stack([count < n for count in beaten_by], dim=-1)


def _keep_by_sorting(groups: Tensor, n: int) -> Tensor:
    order = groups.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)


def violations(weight: Tensor, sparsity: Sparsity) -> int:
    """Number of groups of `weight` that hold more than n non-zeros."""
    nonzeros = (to_groups(weight.detach(), sparsity.m) != 0).sum(dim=-1)
    return int((nonzeros > sparsity.n).sum())
