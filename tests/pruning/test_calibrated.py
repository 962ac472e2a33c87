"""Calibrated masks and weights: scores, groups, exact compensation, patterns by layer under a budget."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.protocols import InputError, PrunableUnit, Sparsity
from lightning_prune.pruning.calibrated import (
    column_scale,
    input_groups,
    layer_problem,
    mask_columns,
    obs_mask,
    refit,
    removal_error,
    write_weight,
)
from lightning_prune.pruning.curvature import Curvature
from lightning_prune.pruning.knapsack import choose
from lightning_prune.pruning.layer_patterns import allocate
from lightning_prune.pruning.nm import nm_mask, to_groups
from lightning_prune.pruning.obs import Layer

TWO_FOUR = Sparsity(2, 4)


def correlated(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mixing + 0.3


def linear_problem(rows: int = 6, columns: int = 8) -> tuple[Layer, Tensor, Tensor]:
    """A layer without bias [rows, columns], its weight, and the inputs it was calibrated on."""
    x = correlated(10 * columns, columns).double()
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).double()
    return Layer.of(weight, x.T @ x, 0.0), weight, x


def test_the_refit_is_the_least_squares_solution_row_by_row() -> None:
    problem, weight, x = linear_problem()
    keep = nm_mask(weight, TWO_FOUR)
    found = refit(problem, keep)
    for row in range(len(weight)):
        columns = keep[row].nonzero().flatten()
        expected = torch.linalg.lstsq(x[:, columns], x @ weight[row]).solution
        torch.testing.assert_close(found[row, columns], expected)
        assert (found[row, ~keep[row]] == 0).all()


def test_nothing_removed_changes_nothing() -> None:
    problem, weight, _ = linear_problem()
    torch.testing.assert_close(refit(problem, torch.ones_like(weight, dtype=torch.bool)), weight)


def test_compensation_never_loses_more_and_masks_chosen_under_it_lose_least() -> None:
    problem, weight, x = linear_problem(48, 64)
    masks = {
        "magnitude": nm_mask(weight, TWO_FOUR),
        "wanda": nm_mask(weight * column_scale(problem, weight, "wanda"), TWO_FOUR),
        "obs": obs_mask(problem, 64, TWO_FOUR),
    }
    lost = {}
    for name, keep in masks.items():
        assert (to_groups(keep, 4).sum(-1) == 2).all()
        fitted = refit(problem, keep)
        lost[name] = removal_error(problem, fitted)
        assert lost[name] <= removal_error(problem, weight * keep)
        true = (x @ (weight - fitted).T).square().sum() / (x @ weight.T).square().sum()
        assert lost[name] == pytest.approx(float(true))
    assert lost["obs"] < min(lost["magnitude"], lost["wanda"])


def test_one_entry_goes_by_the_surgeons_score() -> None:
    """Of one group of M the entry that is cheapest to remove, checked by removing each."""
    x = correlated(30, 4).double()
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).double()
    problem = Layer.of(weight, x.T @ x, 0.0)
    scores = (weight * column_scale(problem, weight, "obs")).abs()
    for row in range(5):
        errors = []
        for gone in range(4):
            keep = torch.ones(5, 4, dtype=torch.bool)
            keep[:, gone] = False
            change = weight[row] - refit(problem, keep)[row]
            errors.append(float(change @ problem.hessian @ change))
        assert int(scores[row].argmin()) == errors.index(min(errors))


def test_wanda_is_the_weight_times_the_norm_of_its_input() -> None:
    problem, weight, x = linear_problem()
    expected = nm_mask(weight * x.norm(dim=0), TWO_FOUR)
    assert torch.equal(nm_mask(weight * column_scale(problem, weight, "wanda"), TWO_FOUR), expected)


@pytest.mark.parametrize("score", ["wanda", "obs"])
def test_a_column_that_reads_nothing_goes_first(score: Any) -> None:
    weight = torch.tensor([[5.0, 1.0, 1.0, 0.5]])
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0] = 0
    scale = column_scale(Layer.of(weight.double(), x.T @ x, 1e-3), weight, score)
    assert scale[0, 0] == 0
    assert nm_mask(weight * scale, TWO_FOUR).tolist() == [[False, True, True, False]]


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(6 * 16, 4, bias=False))


def calibrated(net: Any, x: Tensor) -> tuple[list[Any], Curvature]:
    units = [PrunableUnit(name, "", (), 0) for name in ("0", "3")]
    groups = input_groups(net, units)
    curvature = Curvature(net, groups, 1)
    with curvature.collecting(torch.zeros(len(x), dtype=torch.long)), torch.no_grad():
        net(x)
    return groups, curvature


def test_a_convolution_is_compensated_like_the_outputs_say_bias_included() -> None:
    """The error predicted from moments is that of the layer's outputs, whatever shape its weight has."""
    net, x = network(), torch.randn(16, 8, 4, 4) + 0.5
    groups, curvature = calibrated(net, x)
    problem = layer_problem(net, groups[0], curvature, 0.0)
    with torch.no_grad():
        dense = net[0](x)
    keep = mask_columns(nm_mask(net[0].weight, TWO_FOUR))
    fitted = refit(problem, keep)
    predicted = removal_error(problem, fitted)
    write_weight(net[0], fitted.float())
    with torch.no_grad():
        lost = (net[0](x) - dense).square().sum() / dense.square().sum()
    assert predicted == pytest.approx(float(lost), rel=1e-3)
    assert torch.equal(mask_columns(net[0].weight != 0), keep)
    assert (to_groups(net[0].weight != 0, 4).sum(-1) == 2).all()


def test_scales_have_the_shape_of_the_weights_columns() -> None:
    net = network()
    groups, curvature = calibrated(net, torch.randn(16, 8, 4, 4))
    shapes = [
        tuple(column_scale(layer_problem(net, g, curvature, 0.01), net.get_submodule(g.name).weight, "obs").shape)
        for g in groups
    ]
    assert shapes == [(1, 8, 3, 3), (1, 96)]


# Patterns by layer

PATTERNS = [Sparsity(4, 4), Sparsity(3, 4), TWO_FOUR, Sparsity(1, 4)]


def errors_of(layers: int, seed: int) -> dict[str, dict[Sparsity, float]]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index in range(layers):
        steps = torch.rand(3, generator=generator).cumsum(0).tolist()
        found[f"l{index}"] = dict(zip(PATTERNS, [0.0, *steps], strict=True))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_allocation_is_the_best_of_all_within_the_budget(seed: int) -> None:
    errors, macs = errors_of(5, seed), {f"l{i}": 40 * (i + 1) + 4 * seed for i in range(5)}
    total = sum(macs.values()) + 100
    for budget in (0.4, 0.5, 0.77, 1.0):
        found = allocate(errors, macs, total, budget)

        def kept(patterns: Any) -> float:
            return float(100 + sum(macs[name] * s.density for name, s in zip(errors, patterns, strict=True)))

        def cost(patterns: Any) -> float:
            return float(sum(errors[name][s] for name, s in zip(errors, patterns, strict=True)))

        assert kept(found.values()) <= budget * total
        best = min(cost(p) for p in product(PATTERNS, repeat=5) if kept(p) <= budget * total)
        assert cost(found.values()) == pytest.approx(best)


def test_a_budget_out_of_reach_names_what_is_within() -> None:
    with pytest.raises(InputError, match=r"model\.allocation\.budget: 0\.2 is out of reach: these patterns keep 0\.4"):
        allocate({"a": {Sparsity(1, 4): 1.0}}, {"a": 160}, 200, 0.2)


def test_costs_without_a_common_measure_never_exceed_the_capacity() -> None:
    costs = [[1_000_003, 700_001, 13], [999_983, 501_077, 7], [1_300_021, 600_011, 3]]
    values = [[0.0, -1.0, -5.0]] * 3
    for capacity in (30, 1_000_000, 2_500_000, 3_300_006):
        chosen = choose(costs, values, capacity, grid=100)
        assert sum(row[i] for row, i in zip(costs, chosen, strict=True)) <= capacity


def test_a_capacity_of_so_many_dearest_options_holds_as_many() -> None:
    costs, values = [[0, 700_001, 1_000_003]] * 20, [[0.0, 0.5, 1.0]] * 20
    for count in (1, 7, 20):
        assert sorted(choose(costs, values, 1_000_003 * count, grid=999))[-count:] == [2] * count


def test_more_capacity_than_all_cost_takes_the_best_of_all() -> None:
    assert choose([[0, 1], [0, 3]], [[0.0, 1.0], [0.0, 1.0]], 10**15, grid=10) == [1, 1]
    assert choose([[0, 0]], [[0.0, 1.0]], 10**15, grid=10) == [1]
