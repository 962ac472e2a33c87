"""Which layer gets which N:M pattern, so that predicted errors sum to the least within a budget of MACs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.knapsack import choose

_GRID = 1_000_000


def allocate(
    errors: Mapping[str, Mapping[Sparsity, float]], macs: Mapping[str, int], total: int, budget: float
) -> dict[str, Sparsity]:
    """The pattern of every layer: a multiple-choice knapsack over layers, by dynamic programming.

    Exact where the MACs have a common measure of at least a millionth of the budget, as they have in practice;
    otherwise they are rounded up to it. The budget holds either way.

    Args:
        errors: what each pattern that a layer may take costs in quality, by layer.
        macs: MACs of the same layers in one dense call.
        total: MACs of one dense call of the whole network.
        budget: fraction of `total` that may be left.

    Raises:
        InputError: a budget that the sparsest patterns do not reach, naming what they leave.
    """
    names = list(errors)
    options = [sorted(errors[name]) for name in names]
    costs = [[_kept(macs[n], s) for s in patterns] for n, patterns in zip(names, options, strict=True)]
    untouched = total - sum(macs[name] for name in names)
    least = untouched + sum(min(row) for row in costs)
    capacity = math.floor(Fraction(budget) * total) - untouched
    if least - untouched > capacity:
        kept = least / total
        raise InputError(f"model.allocation.budget: {budget:g} is out of reach: these patterns keep {kept:.4f}")
    values = [[-errors[n][s] for s in patterns] for n, patterns in zip(names, options, strict=True)]
    chosen = choose(costs, values, capacity, _GRID)
    return {name: patterns[i] for name, patterns, i in zip(names, options, chosen, strict=True)}


def _kept(macs: int, sparsity: Sparsity) -> int:
    return -(-macs * sparsity.n // sparsity.m)
