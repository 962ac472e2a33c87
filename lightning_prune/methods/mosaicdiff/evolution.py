"""Evolutionary search over the sparsities of stages, by the drift of sampled images (in the manner of Diff-ES)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lightning_prune.pruning.allocation import Problem, Removed, profile_rule, solve_level

_PARENTS = 3
_SPREAD = 0.5


def search(problem: Problem, budget: int, drift: Callable[[Removed], float], evaluations: int, seed: int) -> Removed:
    """The best of `evaluations` allocations that are uniform inside stages and meet the budget.

    Candidates are profiles over stages, scaled until they meet the budget; the first is flat, later ones are changed
    copies of the best so far.
    """
    generator = torch.Generator().manual_seed(seed)
    stages = len(problem.steps)
    population: list[tuple[float, list[float], Removed]] = []
    for number in range(evaluations):
        profile = [1.0] * stages
        if number:
            parents = population[:_PARENTS]
            parent = parents[int(torch.randint(len(parents), (), generator=generator))][1]
            steps = torch.randn(stages, generator=generator) * _SPREAD
            profile = [p * math.exp(float(step)) for p, step in zip(parent, steps, strict=True)]
        removed = solve_level(problem, profile_rule(profile, problem.maximum), budget)[1]
        population.append((drift(removed), profile, removed))
        population.sort(key=lambda candidate: candidate[0])
    return population[0][2]
