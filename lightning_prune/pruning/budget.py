"""From scores of gates to a schedule that keeps a budget: an exact solver, and both published rules.

Scores and gates are [T, N]: the noisiest step first, blocks in running order. The first step always runs in full. A
budget is a fraction of the dense trajectory's MACs, never exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from lightning_prune.blocks import BlockCosts, BlockGraph, Row
from lightning_prune.protocols import InputError
from lightning_prune.pruning.knapsack import choose

Scores = Sequence[Sequence[float]]
_PASSES = 50


@dataclass(frozen=True)
class _Option:
    """Gates that may run together at one step, what they cost and what they are worth."""

    step: int
    positions: tuple[int, ...]
    cost: int
    value: float


def solve(
    scores: Scores,
    graph: BlockGraph,
    costs: BlockCosts,
    budget: float,
    within: Sequence[Row] | None = None,
    whole_steps: bool = True,
    step_scores: Sequence[float] | None = None,
) -> tuple[Row, ...]:
    """The running rows of greatest total score that cost at most `budget` of the dense trajectory.

    A multiple-choice knapsack over steps, solved by dynamic programming over the budget: exactly where costs have a
    large enough common divisor, see `knapsack`. What rounding leaves elsewhere is filled up gate by gate, so no further
    gate that could run would fit.

    Args:
        scores: value of running each block at each step; only differences at equal cost matter.
        graph: the blocks, in their cache mode.
        costs: what they cost.
        budget: fraction of MACs kept, in (0, 1].
        within: rows of a larger budget; nothing outside them may run.
        whole_steps: whether a step may be skipped altogether.
        step_scores: value of running anything at a step, beyond that of its blocks; None is no such value.

    Raises:
        InputError: a budget out of reach.
    """
    rows = [tuple(graph.full()) for _ in scores] if within is None else list(within)
    total = budget * costs.dense * len(scores)
    values, whole = _positive(scores, step_scores or [0.0] * len(scores), costs)
    steps = [_options(step, values[step], whole[step], rows[step], graph, costs) for step in range(1, len(scores))]
    if not whole_steps:
        steps = [[option for option in options if option.positions] for options in steps]
    floor = costs.dense + sum(min(option.cost for option in options) for options in steps)
    if floor > total * (1 + 1e-12):
        least = floor / (costs.dense * len(scores))
        raise InputError(f"budget: {budget:g} is out of reach: the first step in full alone keeps {least:.4f}")
    chosen = _knapsack(steps, math.floor(total * (1 + 1e-12)) - costs.dense)
    found = [rows[0], *(_runs(option.positions, len(graph)) for option in chosen)]
    return tuple(_filled(found, rows, scores, graph, costs, total))


def nested(
    scores: Scores,
    graph: BlockGraph,
    costs: BlockCosts,
    budgets: Sequence[float],
    whole_steps: bool = True,
    step_scores: Sequence[float] | None = None,
) -> dict[float, tuple[Row, ...]]:
    """Schedules for several budgets from one set of scores; what runs at a budget runs at every larger one."""
    found: dict[float, tuple[Row, ...]] = {}
    within: tuple[Row, ...] | None = None
    for budget in sorted(set(budgets), reverse=True):
        within = found[budget] = solve(scores, graph, costs, budget, within, whole_steps, step_scores)
    return found


def _positive(scores: Scores, whole: Sequence[float], costs: BlockCosts) -> tuple[list[list[float]], list[float]]:
    """Scores of blocks and steps, raised in proportion to cost until every block and every full step is worth running.

    That leaves the order at a binding budget.
    """
    unit = max(1, max(costs.blocks))
    shares, shell = [max(cost / unit, 1e-9) for cost in costs.blocks], costs.shell / unit
    lowest = min(s / c for row in scores for s, c in zip(row, shares, strict=True))
    full = min((w + sum(row)) / (sum(shares) + shell) for w, row in zip(whole, scores, strict=True))
    spread = max(1e-6, max(abs(s) for row in scores for s in row))
    rise = max(0.0, -lowest, -full) + 1e-3 * spread
    return [[s + rise * c for s, c in zip(row, shares, strict=True)] for row in scores], [
        w + rise * shell for w in whole
    ]


def _options(
    step: int, values: Sequence[float], whole: float, allowed: Row, graph: BlockGraph, costs: BlockCosts
) -> list[_Option]:
    """What may run at a step: the best set at every cost, without those that cost more and are worth less."""
    if graph.independent:
        return _independent_options(step, values, whole, allowed, costs)
    return _undominated(
        _Option(
            step,
            positions,
            costs.step(_runs(positions, len(graph))),
            sum(values[i] for i in positions) + (whole if positions else 0),
        )
        for positions in _closed_sets(graph, allowed)
    )


@cache
def _closed_sets(graph: BlockGraph, allowed: Row) -> tuple[tuple[int, ...], ...]:
    """All sets of blocks that can be what runs at a step, where blocks read each other."""
    consumers = graph.consumers()

    def grow(position: int, chosen: frozenset[int]) -> Iterator[frozenset[int]]:
        if position < 0:
            yield chosen
            return
        yield from grow(position - 1, chosen)
        if allowed[position] and any(c < 0 or c in chosen for c in consumers[position]):
            yield from grow(position - 1, chosen | {position})

    return tuple(tuple(sorted(found)) for found in grow(len(graph) - 1, frozenset()))


def _independent_options(
    step: int, values: Sequence[float], whole: float, allowed: Row, costs: BlockCosts
) -> list[_Option]:
    """The same for blocks that do not depend on each other: a small knapsack of its own."""
    best = [_Option(step, (), 0, 0.0)]
    for position in (i for i, open_ in enumerate(allowed) if open_):
        cost, value = costs.blocks[position], values[position]
        more = [_Option(step, (*o.positions, position), o.cost + cost, o.value + value) for o in best]
        best = _undominated([*best, *more])
    return _undominated(
        replace(o, cost=o.cost + costs.shell, value=o.value + whole) if o.positions else o for o in best
    )


def _undominated(options: Iterable[_Option]) -> list[_Option]:
    """Options in order of cost, without those that cost more and are worth no more than another."""
    kept: list[_Option] = []
    for option in sorted(options, key=lambda o: (o.cost, -o.value)):
        if not kept or option.value > kept[-1].value:
            kept.append(option)
    return kept


def _knapsack(steps: Sequence[Sequence[_Option]], capacity: int) -> list[_Option]:
    """One option a step, of greatest total value at a total cost of at most `capacity`."""
    costs = [[option.cost for option in options] for options in steps]
    values = [[option.value for option in options] for options in steps]
    return [options[index] for options, index in zip(steps, choose(costs, values, capacity), strict=True)]


def _runs(positions: tuple[int, ...], blocks: int) -> Row:
    return tuple(i in positions for i in range(blocks))


def _filled(
    rows: list[Row], allowed: Sequence[Row], scores: Scores, graph: BlockGraph, costs: BlockCosts, total: float
) -> list[Row]:
    """Open further gates, best first, while one that would run fits."""
    left = total * (1 + 1e-12) - sum(costs.step(row) for row in rows)
    while additions := list(_additions(rows, allowed, graph, costs, left)):
        step, position, cost = max(additions, key=lambda a: scores[a[0]][a[1]])
        rows[step] = tuple(runs or i == position for i, runs in enumerate(rows[step]))
        left -= cost
    return rows


def _additions(
    rows: Sequence[Row], allowed: Sequence[Row], graph: BlockGraph, costs: BlockCosts, left: float
) -> Iterator[tuple[int, int, int]]:
    """(step, block, cost) of gates that could be opened alone, would run, and cost at most `left`."""
    consumers = graph.consumers()
    for step in range(1, len(rows)):
        row = rows[step]
        for position in range(len(graph)):
            read = any(c < 0 or row[c] for c in consumers[position])
            if not row[position] and allowed[step][position] and read:
                cost = costs.blocks[position] + (0 if any(row) else costs.shell)
                if cost <= left:
                    yield step, position, cost


# The published rules


def bisect_threshold(
    keep: Scores, graph: BlockGraph, costs: BlockCosts, budget: float, tolerance: float = 0.0125
) -> tuple[Row, ...]:
    """Algorithm 1 of the paper: one threshold on keep scores in [0, 1], found by bisection.

    The share pruned is a step function of the threshold, so the printed loop need not end; here it ends after 50
    rounds at the last threshold that kept the budget, and further gates are opened, best first, while one fits. Unlike
    the printed rule, the result never exceeds the budget.
    """
    low, high = 0.0, 1.0 + 1e-9
    best = _thresholded(keep, high, graph)
    for _ in range(_PASSES):
        middle = (low + high) / 2
        rows = _thresholded(keep, middle, graph)
        kept = costs.kept(rows)
        if kept <= budget:
            best, high = rows, middle
        else:
            low = middle
        if 0 <= budget - kept < tolerance:
            break
    if costs.kept(best) > budget:
        raise InputError(f"budget: {budget:g} is out of reach: no threshold keeps less than {costs.kept(best):.4f}")
    everything = [graph.full()] * len(best)
    return tuple(_filled(list(best), everything, keep, graph, costs, budget * costs.dense * len(best)))


def _thresholded(keep: Scores, threshold: float, graph: BlockGraph) -> tuple[Row, ...]:
    rows = [graph.running([s >= threshold for s in row]) for row in keep]
    return (graph.full(), *rows[1:])


def greedy_cascades(skip: Scores, graph: BlockGraph, costs: BlockCosts, pruned: float) -> tuple[Row, ...]:
    """The released code's rule: passes over blocks from the output inwards, with a falling threshold.

    Its shares leave out what is outside the blocks, so steps that are not skipped as a whole keep a little more than
    1 - `pruned` of the MACs.

    In a pass, steps at which a block is kept and its skip score exceeds the threshold lose the block's whole
    cascade, highest score first, until the next would reach the share `pruned`. Shares are of one call's MACs.
    """
    rows = [list(graph.full()) for _ in skip]
    done, threshold = 0.0, 0.95
    while threshold >= 0 and done < pruned:
        for position in reversed(range(len(graph))):
            done = _skip_cascades(rows, position, skip, threshold, graph, costs, pruned, done)
        threshold -= 0.05
    return tuple(tuple(row) for row in rows)


def _skip_cascades(
    rows: list[list[bool]],
    position: int,
    skip: Scores,
    threshold: float,
    graph: BlockGraph,
    costs: BlockCosts,
    pruned: float,
    done: float,
) -> float:
    candidates = [t for t in range(1, len(rows)) if rows[t][position] and skip[t][position] > threshold]
    for step in sorted(candidates, key=lambda t: -skip[t][position]):
        left = graph.running([runs and i != position for i, runs in enumerate(rows[step])])
        saved = sum(c for c, was, runs in zip(costs.blocks, rows[step], left, strict=True) if was and not runs)
        share = saved / (costs.dense * len(rows))
        if done + share >= pruned:
            break
        rows[step], done = list(left), done + share
    return done
