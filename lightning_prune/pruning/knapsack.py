"""A multiple-choice knapsack: one option of every item, of greatest total value within a capacity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np

GRID = 20_000  # cells of the capacity where costs have no coarser common measure


def choose(
    costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]], capacity: int, grid: int = GRID
) -> list[int]:
    """Number of the option chosen of each item, by dynamic programming over the capacity.

    Costs are rounded up to their greatest common divisor, so the choice is exact, or to a `grid`-th of the capacity
    where that is coarser, so the capacity holds all the same.

    Args:
        costs: of the options of each item, at least 0.
        values: of the same options.
        capacity: what they may cost together; at least what the cheapest options do.
        grid: largest number of cells of the capacity.
    """
    unit = _unit(costs, capacity, grid)
    cells = capacity // unit
    best = np.zeros(cells + 1)
    picks: list[np.ndarray] = []
    for item_costs, item_values in zip(costs, values, strict=True):
        after, pick = np.full(cells + 1, -np.inf), np.zeros(cells + 1, dtype=np.min_scalar_type(len(item_costs)))
        for index, (cost, value) in enumerate(zip(item_costs, item_values, strict=True)):
            size = -(-cost // unit)
            if size > cells:
                continue
            candidate = best[: cells + 1 - size] + value
            better = candidate > after[size:]
            after[size:][better] = candidate[better]
            pick[size:][better] = index
        best, picks = after, [*picks, pick]
    return _walk_back(costs, picks, cells, unit)


def _unit(costs: Sequence[Sequence[int]], capacity: int, grid: int) -> int:
    divisor = reduce(math.gcd, (cost for options in costs for cost in options), 0)
    cheapest = sum(min(options) for options in costs)
    # Rounding up must leave room for the cheapest option of every item.
    slack = max(1, (capacity - cheapest) // max(1, len(costs)))
    return max(1, divisor, min(capacity // grid, slack))


def _walk_back(costs: Sequence[Sequence[int]], picks: Sequence[np.ndarray], cells: int, unit: int) -> list[int]:
    chosen: list[int] = []
    for options, pick in zip(reversed(costs), reversed(picks), strict=True):
        index = int(pick[cells])
        chosen.append(index)
        cells -= -(-options[index] // unit)
    return chosen[::-1]
