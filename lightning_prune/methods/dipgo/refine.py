"""Hill climbing on a schedule, by samples that are measured."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from lightning_prune.blocks import GateSchedule, Row
from lightning_prune.methods.dipgo.controls import GateProblem

_NEAR = 3  # steps that a row moves at most
_MOVES = 0.7  # share of trials that move a row; the others trade one gate for another


def refined(
    loss: Callable[[GateSchedule], float],
    problem: GateProblem,
    rows: Sequence[Row],
    budget: float,
    trials: int,
    chance: random.Random,
    whole_steps: bool = True,
) -> tuple[Row, ...]:
    """The best of a schedule and of what `trials` small changes make of it, one after the other, within the budget.

    A change swaps the rows of two near steps, or shuts a gate and opens another.

    Args:
        loss: consistency of a schedule's samples.
        problem: blocks, costs and sampler.
        rows: the schedule to begin with.
        budget: fraction of MACs that no trial exceeds.
        trials: schedules that are measured.
        chance: draws the changes.
        whole_steps: whether a step may be skipped altogether.
    """
    best, least = tuple(rows), loss(problem.schedule(rows))
    limit = max(budget, problem.costs.kept(rows)) * (1 + 1e-12)
    for _ in range(trials):
        changed = _moved(best, chance) if chance.random() < _MOVES else _traded(best, problem, chance)
        if problem.costs.kept(changed) > limit or (not whole_steps and not all(map(any, changed))):
            continue
        found = loss(problem.schedule(changed))
        if found < least:
            best, least = changed, found
    return best


def _moved(rows: tuple[Row, ...], chance: random.Random) -> tuple[Row, ...]:
    """Two near steps with their rows swapped."""
    one = chance.randrange(1, len(rows))
    other = one + chance.choice([d for d in range(-_NEAR, _NEAR + 1) if d and 1 <= one + d < len(rows)] or [0])
    swapped = list(rows)
    swapped[one], swapped[other] = rows[other], rows[one]
    return tuple(swapped)


def _traded(rows: tuple[Row, ...], problem: GateProblem, chance: random.Random) -> tuple[Row, ...]:
    """One gate shut and another opened, with what that shuts besides."""
    gates = [(step, block) for step in range(1, len(rows)) for block in range(len(problem.graph))]
    opened = [gate for gate in gates if rows[gate[0]][gate[1]]]
    closed = [gate for gate in gates if not rows[gate[0]][gate[1]]]
    if not opened or not closed:
        return rows
    changed = [list(row) for row in rows]
    for step, block in (chance.choice(opened), chance.choice(closed)):
        changed[step][block] = not changed[step][block]
    return (rows[0], *(problem.graph.running(row) for row in changed[1:]))
