"""The solver against enumeration, budgets against costs, the published rules against their printed results."""

import itertools
import random
from typing import Any

import pytest

from lightning_prune.blocks import BlockCosts, BlockGraph, Row
from lightning_prune.protocols import InputError
from lightning_prune.pruning.budget import bisect_threshold, greedy_cascades, nested, solve
from tests.factories import tiny_dit, tiny_unet
from tests.test_blocks import CHAIN, sd15_graph

Case = tuple[BlockGraph, BlockCosts]


def case(graph: BlockGraph, seed: int = 0) -> Case:
    draw = random.Random(seed)
    costs = tuple(draw.randrange(2, 19) for _ in graph.names)
    return graph, BlockCosts(costs, 1)


CASES: list[Any] = [
    lambda: case(CHAIN),
    lambda: case(tiny_unet().blocks("coarse")),
    lambda: case(tiny_unet().blocks("fine"), 1),
    lambda: case(tiny_dit().blocks("half"), 2),
]


def draw_scores(graph: BlockGraph, steps: int, seed: int = 0) -> list[list[float]]:
    draw = random.Random(seed)
    return [[draw.random() for _ in graph.names] for _ in range(steps)]


def worth(rows: Any, scores: Any) -> float:
    pairs = [(s, r) for row, values in zip(rows[1:], scores[1:], strict=True) for s, r in zip(values, row, strict=True)]
    return float(sum(s for s, runs in pairs if runs))


@pytest.mark.parametrize("make", [CASES[0], CASES[1], CASES[3]])
@pytest.mark.parametrize("budget", [0.5, 0.7, 0.85])
def test_nothing_within_the_budget_is_worth_more(make: Any, budget: float) -> None:
    graph, costs = make()
    scores = draw_scores(graph, 3)
    rows = {graph.running(gates) for gates in itertools.product([0, 1], repeat=len(graph))}
    feasible = [
        found for pair in itertools.product(rows, repeat=2) if costs.kept(found := (graph.full(), *pair)) <= budget
    ]
    best = max(worth(found, scores) for found in feasible)
    assert worth(solve(scores, graph, costs, budget), scores) == pytest.approx(best, abs=0.02)


@pytest.mark.parametrize("make", [CASES[0], CASES[1], CASES[3]])
def test_nothing_is_worth_more_where_steps_have_a_worth_of_their_own(make: Any) -> None:
    graph, costs = make()
    scores, steps = draw_scores(graph, 4, seed=3), [0.0, 3.0, 0.2, 0.7]
    rows = {graph.running(gates) for gates in itertools.product([0, 1], repeat=len(graph))}

    def total(found: Any) -> float:
        return worth(found, scores) + sum(w for w, row in zip(steps, found, strict=True) if any(row))

    triples = ((graph.full(), *three) for three in itertools.product(rows, repeat=3))
    best = max(total(found) for found in triples if costs.kept(found) <= 0.6)
    assert total(solve(scores, graph, costs, 0.6, step_scores=steps)) == pytest.approx(best, abs=0.02)


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("budget", [0.25, 0.35, 0.5, 1.0])
def test_a_budget_is_kept_and_missed_by_less_than_any_gate(make: Any, budget: float) -> None:
    graph, costs = make()
    rows = solve(draw_scores(graph, 12), graph, costs, budget)
    left = budget * costs.dense * 12 - sum(map(costs.step, rows))
    assert left >= -1e-9
    assert rows[0] == graph.full()
    assert all(graph.running(row) == row for row in rows)
    if budget == 1.0:
        assert set(rows) == {graph.full()}
    for row in rows:
        for position in range(len(graph)):
            opened = [runs or i == position for i, runs in enumerate(row)]
            if graph.running(opened) == tuple(opened) != row:
                assert costs.step(opened) - costs.step(row) > left


def test_real_costs_come_within_a_gate_of_the_budget() -> None:
    graph, costs = sd15_graph("coarse")
    for budget in (0.2, 0.35, 0.5):
        rows = solve(draw_scores(graph, 50), graph, costs, budget)
        missed = (budget - costs.kept(rows)) * costs.dense * 50
        assert 0 <= missed <= max(costs.blocks)


@pytest.mark.parametrize("make", CASES)
def test_schedules_of_several_budgets_are_nested(make: Any) -> None:
    graph, costs = make()
    found = nested(draw_scores(graph, 10), graph, costs, [0.3, 0.7, 0.5])
    assert list(found) == [0.7, 0.5, 0.3]
    for larger, smaller in itertools.pairwise(found.values()):
        for wide, narrow in zip(larger, smaller, strict=True):
            assert all(a or not b for a, b in zip(wide, narrow, strict=True))


def test_whole_steps_can_be_kept_from_being_skipped() -> None:
    graph, costs = case(tiny_unet().blocks("coarse"))
    scores = [[1.0] * len(graph), *[[9.0] * len(graph)] * 3, *[[0.01] * len(graph)] * 4]
    assert any(not any(row) for row in solve(scores, graph, costs, 0.5))
    rows = solve(scores, graph, costs, 0.5, whole_steps=False)
    assert all(any(row) for row in rows)
    assert costs.kept(rows) <= 0.5


def test_a_budget_out_of_reach_names_the_least() -> None:
    graph, costs = case(CHAIN)
    with pytest.raises(InputError, match=r"0\.05 is out of reach.*0\.1000"):
        solve(draw_scores(graph, 10), graph, costs, 0.05)


def released_case(draw: random.Random) -> tuple[list[list[float]], BlockGraph, BlockCosts]:
    graph, costs = sd15_graph("coarse")
    chosen = set(draw.sample(range(1, 50), 40))
    skip = [[draw.uniform(0.2, 0.5) for _ in graph.names] for _ in range(50)]
    for step in chosen:
        skip[step][-1] = draw.uniform(0.955, 0.999)
    return skip, graph, costs


@pytest.mark.parametrize("seed", range(3))
def test_the_released_rule_gives_the_released_totals(seed: int) -> None:
    skip, graph, costs = released_case(random.Random(seed))
    rows = greedy_cascades(skip, graph, costs, 0.8)
    assert sum(map(sum, rows)) == 89
    pruned = sum(c for row in rows for c, runs in zip(costs.blocks, row, strict=True) if not runs) / costs.dense / 50
    assert pruned == pytest.approx(0.799986, abs=5e-7)


def test_bisection_ends_within_the_budget_even_on_ties() -> None:
    graph, costs = case(CHAIN)
    keep = draw_scores(graph, 20)
    for budget in (0.3, 0.6):
        assert costs.kept(bisect_threshold(keep, graph, costs, budget)) <= budget
    tied: list[list[float]] = [[0.5] * 3 for _ in range(20)]
    rows: tuple[Row, ...] = bisect_threshold(tied, graph, costs, 0.5)
    assert 0.5 - max(costs.blocks) / (20 * costs.dense) < costs.kept(rows) <= 0.5, "further gates are opened one by one"
