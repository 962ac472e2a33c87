"""Hill climbing on a schedule, by samples that are measured."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_prune.blocks import GateSchedule, Row
from lightning_prune.methods.dipgo.controls import GateProblem

_NEAR = 3  # steps that a row moves at most
_MOVES = 0.8  # share of trials that move a row; the others trade one gate for another


@dataclass(frozen=True)
class Changes:
    """What a change may do.

    Attributes:
        skip_steps: leave a step without any block.
        trade_gates: shut a gate and open another; without it rows move, but stay what they are.
    """

    skip_steps: bool = True
    trade_gates: bool = True


def refined(
    loss: Callable[[GateSchedule], float],
    problem: GateProblem,
    starts: Sequence[Sequence[Row]],
    budget: float,
    trials: int,
    chance: random.Random,
    allowed: Changes = Changes(),
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[Row, ...]:
    """The best of some schedules, and of what `trials` small changes make of it, one after the other.

    A change swaps the rows of two near steps, or shuts a gate and opens another. What is found keeps no more MACs
    than the budget, and within a gate no fewer than the best start.

    Args:
        loss: consistency of a schedule's samples.
        problem: blocks, costs and sampler.
        starts: schedules to begin with, within the budget.
        budget: fraction of MACs that no trial exceeds.
        trials: changes that are tried; those seen before or outside the bounds are not measured.
        chance: draws the changes.
        allowed: what changes may do.
        advance: told of every trial.
    """
    known = {tuple(map(tuple, rows)) for rows in starts}
    least, best = min((loss(problem.schedule(rows)), rows) for rows in sorted(known))
    gate = max(problem.costs.blocks) / (problem.costs.dense * len(best))
    low, high = min(problem.costs.kept(best), budget - gate) * (1 - 1e-12), budget * (1 + 1e-12)
    for _ in range(trials):
        advance(1)
        moves = not allowed.trade_gates or chance.random() < _MOVES
        changed = _moved(best, chance) if moves else _traded(best, problem, chance)
        skips = not all(map(any, changed))
        if changed in known or (skips and not allowed.skip_steps) or not low <= problem.costs.kept(changed) <= high:
            continue
        known.add(changed)
        found = loss(problem.schedule(changed))
        if found < least:
            best, least = changed, found
    return best


def _moved(rows: tuple[Row, ...], chance: random.Random) -> tuple[Row, ...]:
    """A step that runs anything and a near one that runs something else, with their rows swapped."""
    near = [d for d in range(-_NEAR, _NEAR + 1) if d]
    pairs = [
        (one, one + d)
        for one in range(1, len(rows))
        for d in near
        if any(rows[one]) and 1 <= one + d < len(rows) and rows[one + d] != rows[one]
    ]
    if not pairs:
        return rows
    one, other = chance.choice(pairs)
    swapped = list(rows)
    swapped[one], swapped[other] = rows[other], rows[one]
    return tuple(swapped)


def _traded(rows: tuple[Row, ...], problem: GateProblem, chance: random.Random) -> tuple[Row, ...]:
    """One gate shut and another opened, with what that shuts besides.

    Steps that are skipped as a whole stay so: a single block in one of them brings the samples that are measured nearer
    to the dense ones and their distribution far away, and takes a step's time outside the blocks.
    """
    gates = [(step, block) for step in range(1, len(rows)) for block in range(len(problem.graph))]
    opened = [gate for gate in gates if rows[gate[0]][gate[1]]]
    closed = [gate for gate in gates if not rows[gate[0]][gate[1]] and any(rows[gate[0]])]
    if not opened or not closed:
        return rows
    changed = [list(row) for row in rows]
    for step, block in (chance.choice(opened), chance.choice(closed)):
        changed[step][block] = not changed[step][block]
    return (rows[0], *(problem.graph.running(row) for row in changed[1:]))
