"""A multiple-choice knapsack: one option of every item, of greatest total value within a capacity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce

import numpy as np

GRID = 50_000  # cells of the capacity at most


def choose(
    costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]], capacity: int, grid: int = GRID
) -> list[int]:
    """Number of the option chosen of each item, by dynamic programming over the capacity.

    The choice is exact where the capacity has at most `grid` times the costs' greatest common divisor. Elsewhere costs
    are rounded up to cells, so the capacity holds all the same, and the dearest option is a whole number of them: a
    capacity of so many dearest options holds as many.

    Args:
        costs: of the options of each item, at least 0.
        values: of the same options.
        capacity: what they may cost together; at least what the cheapest options do.
        grid: largest number of cells of the capacity.
    """
    capacity = min(capacity, sum(max(options) for options in costs))
    unit = _unit(costs, capacity, grid)
    cells = int(capacity // unit)
    best = np.zeros(cells + 1)
    picks: list[np.ndarray] = []
    for item_costs, item_values in zip(costs, values, strict=True):
        after, pick = np.full(cells + 1, -np.inf), np.zeros(cells + 1, dtype=np.min_scalar_type(len(item_costs)))
        for index, (cost, value) in enumerate(zip(item_costs, item_values, strict=True)):
            size = math.ceil(cost / unit)
            if size > cells:
                continue
            candidate = best[: cells + 1 - size] + value
            better = candidate > after[size:]
            after[size:][better] = candidate[better]
            pick[size:][better] = index
        best, picks = after, [*picks, pick]
    return _walk_back(costs, picks, cells, unit)


def _unit(costs: Sequence[Sequence[int]], capacity: int, grid: int) -> Fraction:
    divisor = max(1, reduce(math.gcd, (cost for options in costs for cost in options), 0))
    if capacity // divisor <= grid:
        return Fraction(divisor)
    cheapest = sum(min(options) for options in costs)
    # Rounding up must leave room for the cheapest option of every item.
    slack = max(divisor, (capacity - cheapest) // max(1, len(costs)))
    coarsest = min(Fraction(capacity, grid), Fraction(slack))
    dearest = max(max(options) for options in costs)
    return Fraction(dearest, math.ceil(dearest / coarsest))


def _walk_back(costs: Sequence[Sequence[int]], picks: Sequence[np.ndarray], cells: int, unit: Fraction) -> list[int]:
    chosen: list[int] = []
    for options, pick in zip(reversed(costs), reversed(picks), strict=True):
        index = int(pick[cells])
        chosen.append(index)
        cells -= math.ceil(options[index] / unit)
    return chosen[::-1]
