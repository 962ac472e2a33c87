"""Allocations: budgets met from below, the dynamic program against brute force, uniform rules solved for a target."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lightning_prune.protocols import InputError, WidthGroup
from lightning_prune.pruning.allocation import (
    Problem,
    dynamic,
    give_back,
    removed_at,
    rising,
    solve_level,
    uniform_in_stages,
)


def group(kind: str, units: int) -> WidthGroup:
    return WidthGroup(f"{kind}{units}", kind, "output", units, 1, 1, ())


def problem(groups: list[WidthGroup], steps: list[int], seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    unit_macs = [1000 // g.units * 16 + 7 for g in groups]
    errors = [[rising(torch.rand(g.units, generator=generator).cumsum(0) - 0.1) for g in groups] for _ in steps]
    removable = sum(u * g.units for u, g in zip(unit_macs, groups, strict=True))
    return Problem(groups, unit_macs, removable + 5000, steps, errors)


SMALL = [group("heads", 4), group("norm-groups", 5)]
LARGE = [group("heads", 4), group("channels", 64), group("norm-groups", 8), group("channels", 48)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [0.1, 0.3, 0.5])
def test_dynamic_finds_the_least_error(seed: int, target: float) -> None:
    given = problem(SMALL, [3, 5], seed)
    budget = given.budget(target)
    spaces = [range(given.most(g) + 1) for _ in given.steps for g in range(2)]
    options = [[list(c[:2]), list(c[2:])] for c in product(*spaces)]
    least = min(given.error(o) for o in options if given.macs(o) <= budget)
    found = dynamic(given, budget, buckets=given.dense_macs)
    assert given.macs(found) <= budget
    assert given.error(found) == pytest.approx(least)


@pytest.mark.parametrize("target", [0.2, 0.33, 0.5])
@pytest.mark.parametrize("method", ["dynamic", "uniform"])
def test_a_target_is_met_from_below_within_one_unit(method: str, target: float) -> None:
    given = problem(LARGE, [7, 7, 6])
    budget = given.budget(target)
    found = dynamic(given, budget) if method == "dynamic" else solve_level(given, lambda s: [s] * 3, budget)[1]
    assert given.macs(found) <= budget
    for s, row in enumerate(found):
        for g, k in enumerate(row):
            assert k == 0 or given.macs(found) + given.steps[s] * given.unit_macs[g] > budget, "one more unit fits"


def test_dynamic_is_ahead_of_uniform_on_its_own_measure() -> None:
    for seed in range(5):
        given = problem(LARGE, [7, 7, 6], seed)
        budget = given.budget(0.4)
        assert given.error(dynamic(given, budget)) < given.error(solve_level(given, lambda s: [s] * 3, budget)[1])


def test_macs_are_linear_in_units() -> None:
    given = problem(SMALL, [2, 3])
    assert given.macs(given.nothing()) == given.dense_macs == 5 * given.call_macs
    one = given.nothing()
    one[1][0] = 1
    assert given.dense_macs - given.macs(one) == 3 * given.unit_macs[0]


def test_the_largest_reachable_target_is_named() -> None:
    given = problem(SMALL, [2, 3])
    with pytest.raises(InputError, match=r"model\.target: 0\.95 of the MACs cannot be removed; .* the largest is") as e:
        given.budget(0.95)
    reach = float(str(e.value).rsplit(" ", 1)[1])
    assert dynamic(given, given.budget(reach)) == given.everything()
    with pytest.raises(InputError, match="cannot be removed"):
        given.budget(-0.1)


def test_rounding_of_units() -> None:
    assert [removed_at(group("heads", 16), s) for s in (0.0, 0.3, 0.5, 0.99)] == [0, 4, 8, 15]
    assert [removed_at(group("channels", 10), s) for s in (0.0, 0.27, 0.94, 1.0)] == [0, 3, 9, 9]
    assert removed_at(group("heads", 2), 0.5) == 1
    assert uniform_in_stages(problem(SMALL, [1, 1]), [0.5, 1.0]) == [[2, 2], [3, 4]]


def test_a_rule_that_cannot_reach_the_target() -> None:
    given = problem(SMALL, [2, 3])
    with pytest.raises(InputError, match=r"model\.target"):
        solve_level(given, lambda s: [0.0, s], given.budget(0.6))


def test_units_are_given_back_where_they_help_most() -> None:
    errors = [[torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.tensor([0.0, 5.0, 6.0, 7.0])]]
    given = Problem([group("heads", 4), group("heads", 4)], [10, 10], 100, [1], errors)
    assert give_back(given, [[3, 3]], 50) == [[2, 3]]
    assert give_back(given, [[2, 1]], 80) == [[2, 0]]
