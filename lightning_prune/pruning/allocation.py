"""How many units each width group loses in each stage, under a budget for the whole sampling run.

Budgets are MACs; anything else that calls and units cost in proportion, such as seconds, may stand in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_prune.protocols import InputError, WidthGroup
from lightning_prune.pruning.stages import MAXIMUM, channels_removed, heads_removed

Removed = list[list[int]]


@dataclass(frozen=True)
class Problem:
    """What there is to remove, and what it saves.

    Attributes:
        groups: the width groups of the dense network.
        unit_macs: MACs of one unit of each group in one call.
        call_macs: MACs of one call of the dense network.
        steps: sampling steps of each stage.
        errors: cost of removing the first k units, k = 0 .. units - 1, by stage and group, rising.
        maximum: largest share of a group's units that may go.
        unit: what is counted, for messages.
    """

    groups: Sequence[WidthGroup]
    unit_macs: Sequence[int]
    call_macs: int
    steps: Sequence[int]
    errors: Sequence[Sequence[Tensor]]
    maximum: float = MAXIMUM
    unit: str = "MACs"

    @property
    def dense_macs(self) -> int:
        """MACs of a sampling run of the dense network, without guidance."""
        return self.call_macs * sum(self.steps)

    def macs(self, removed: Removed) -> int:
        """MACs of a sampling run."""
        return self.dense_macs - sum(
            steps * sum(k * unit for k, unit in zip(row, self.unit_macs, strict=True))
            for steps, row in zip(self.steps, removed, strict=True)
        )

    def error(self, removed: Removed) -> float:
        """The predicted cost."""
        return sum(
            float(curve[k])
            for curves, row in zip(self.errors, removed, strict=True)
            for curve, k in zip(curves, row, strict=True)
        )

    def most(self, group: int) -> int:
        """Units of a group that may go."""
        return removed_at(self.groups[group], self.maximum)

    def nothing(self) -> Removed:
        return [[0] * len(self.groups) for _ in self.steps]

    def everything(self) -> Removed:
        return [[self.most(g) for g in range(len(self.groups))] for _ in self.steps]

    def budget(self, target: float) -> int:
        """MACs that may be left for a share `target` of the run's MACs to go.

        Raises:
            InputError: a share out of reach, with the largest that is not.
        """
        budget = int((1 - target) * self.dense_macs)
        least = self.macs(self.everything())
        if not 0 <= target < 1 or budget < least:
            reach = 1 - least / self.dense_macs
            raise InputError(
                f"model.target: {target:g} of the {self.unit} cannot be removed; with at most {self.maximum:g} of "
                f"every width the largest is {int(reach * 10000) / 10000:g}"
            )
        return budget


def removed_at(group: WidthGroup, sparsity: float) -> int:
    """Units removed at a sparsity: channels to the nearest, larger units floored, one always stays."""
    count = channels_removed if group.kind == "channels" else heads_removed
    return count(group.units, sparsity)


def uniform_in_stages(problem: Problem, sparsities: Sequence[float]) -> Removed:
    """One sparsity for all groups of a stage."""
    return [
        [min(removed_at(group, sparsity), problem.most(g)) for g, group in enumerate(problem.groups)]
        for sparsity in sparsities
    ]


def solve_level(problem: Problem, rule: Callable[[float], Sequence[float]], budget: int) -> tuple[float, Removed]:
    """The smallest S at which a rule from S to the stages' sparsities meets the budget, its excess given back.

    Raises:
        InputError: the budget is out of the rule's reach.
    """
    low, high = 0.0, problem.maximum
    least = problem.macs(uniform_in_stages(problem, rule(high)))
    if least > budget:
        reach = int((1 - least / problem.dense_macs) * 10000) / 10000
        raise InputError(
            f"model.target: a rule that is uniform over layers removes at most {reach:g} of the {problem.unit}"
        )
    for _ in range(40):
        middle = (low + high) / 2
        if problem.macs(uniform_in_stages(problem, rule(middle))) <= budget:
            high = middle
        else:
            low = middle
    return high, give_back(problem, uniform_in_stages(problem, rule(high)), budget)


def profile_rule(profile: Sequence[float], maximum: float) -> Callable[[float], list[float]]:
    """From a level in [0, maximum] to sparsities of stages in proportion to a profile; none passes the maximum.

    At the largest level every stage has reached it, so any budget within reach is met.
    """

    def rule(level: float) -> list[float]:
        share = level / maximum
        if share >= 1:
            return [maximum] * len(profile)
        return [min(maximum, share / (1 - share) * part) for part in profile]

    return rule


def give_back(problem: Problem, removed: Removed, budget: int) -> Removed:
    """Return units while they fit into the budget, the one that lowers the error most per MAC first."""
    removed = [list(row) for row in removed]
    left = budget - problem.macs(removed)
    errors = [[curve.tolist() for curve in row] for row in problem.errors]
    while True:
        best: tuple[float, int, int] | None = None
        for s, row in enumerate(removed):
            for g, k in enumerate(row):
                cost = problem.steps[s] * problem.unit_macs[g]
                if k == 0 or cost > left:
                    continue
                gain = (errors[s][g][k] - errors[s][g][k - 1]) / max(cost, 1)
                if best is None or gain > best[0]:
                    best = (gain, s, g)
        if best is None:
            return removed
        _, s, g = best
        removed[s][g] -= 1
        left -= problem.steps[s] * problem.unit_macs[g]


def dynamic(problem: Problem, budget: int, levels: int = 32, buckets: int = 8000) -> Removed:
    """The allocation of least predicted error: a knapsack over stages and groups, solved by dynamic programming.

    Args:
        problem: what there is to remove.
        budget: MACs that may be left.
        levels: widths of a group that are considered, apart from none; what the grid leaves over is given back.
        buckets: resolution of the budget; costs are rounded up to it, so the budget holds.
    """
    fixed = problem.macs(problem.everything())
    width = max(1, -(-(budget - fixed) // buckets))
    capacity = (budget - fixed) // width
    best = np.zeros(capacity + 1)
    items = [(s, g) for s in range(len(problem.steps)) for g in range(len(problem.groups))]
    taken: list[tuple[list[int], np.ndarray]] = []
    for s, g in items:
        candidates = _levels(problem.most(g), levels)
        curve = problem.errors[s][g].tolist()
        found, choice = np.full(capacity + 1, np.inf), np.zeros(capacity + 1, dtype=np.int16)
        for number, k in enumerate(candidates):
            cost = -(-(problem.most(g) - k) * problem.steps[s] * problem.unit_macs[g] // width)
            if cost > capacity:
                continue
            value = best[: capacity + 1 - cost] + curve[k]
            better = value < found[cost:]
            found[cost:][better] = value[better]
            choice[cost:][better] = number
        best = found
        taken.append((candidates, choice))
    removed, at = problem.nothing(), capacity
    for (s, g), (candidates, choice) in zip(reversed(items), reversed(taken), strict=True):
        removed[s][g] = candidates[int(choice[at])]
        at -= -(-(problem.most(g) - removed[s][g]) * problem.steps[s] * problem.unit_macs[g] // width)
    return give_back(problem, removed, budget)


def _levels(most: int, levels: int) -> list[int]:
    return sorted({round(i * most / levels) for i in range(levels + 1)})


def rising(errors: Tensor) -> Tensor:
    """A curve [units] without the falls that rounding and measuring leave, from 0."""
    return torch.cummax(errors.clamp(min=0), 0).values
