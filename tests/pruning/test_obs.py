"""Group Optimal Brain Surgeon against the naive loop, the least-squares refit and the true error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_prune.protocols import InputError
from lightning_prune.pruning.obs import Layer, Removal, columns_of, greedy_removal, removal_in_order


def problem(n: int = 24, m: int = 7, rows: int = 500, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs [rows, n], correlated, and a weight [m, n]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64) @ (mix + torch.eye(n, dtype=torch.float64))
    return x, torch.randn(m, n, generator=generator, dtype=torch.float64)


def textbook(weight: Tensor, hessian: Tensor, units: int, channels: int) -> tuple[Removal, Tensor]:
    """The published loop word for word: score every group, remove, update weight and inverse. Returns final weight."""
    w, p, left = weight.clone(), torch.linalg.inv(hessian), list(range(units))
    order, scores = [], [0.0]
    for _ in range(units - 1):
        cost = {}
        for unit in left:
            g = list(range(unit * channels, (unit + 1) * channels))
            cost[unit] = float((w[:, g] @ torch.linalg.inv(p[g][:, g]) @ w[:, g].T).trace())
        unit = min(left, key=cost.__getitem__)
        g = list(range(unit * channels, (unit + 1) * channels))
        inner = torch.linalg.inv(p[g][:, g])
        w = w - w[:, g] @ inner @ p[g]
        p = p - p[:, g] @ inner @ p[g]
        p[g], p[:, g] = 0, 0
        p[g, g] = 1
        w[:, g] = 0
        left.remove(unit)
        order.append(unit)
        scores.append(cost[unit])
        if len(order) == units // 2:
            half = w.clone()
    return Removal(tuple(order), torch.tensor(scores, dtype=torch.float64).cumsum(0)), half


@pytest.mark.parametrize(("n", "channels"), [(24, 1), (24, 4), (24, 8), (150, 1), (200, 1)])
def test_equals_the_textbook_loop(n: int, channels: int) -> None:
    x, weight = problem(n)
    layer, units = Layer.of(weight, x.T @ x, damping=0.0), n // channels
    expected, half = textbook(weight, x.T @ x, units, channels)
    found = greedy_removal(layer, units, channels)
    assert found.order == expected.order
    assert torch.allclose(found.errors, expected.errors, rtol=1e-9, atol=0)
    kept = columns_of(found.kept(units // 2), channels, n, units)
    assert (layer.refit(kept) - half[:, kept]).abs().max() < 1e-9


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("removed", [1, 3, 5])
def test_surviving_columns_are_the_least_squares_refit(channels: int, removed: int) -> None:
    x, weight = problem()
    layer, units = Layer.of(weight, x.T @ x, damping=0.0), 24 // channels
    kept = columns_of(greedy_removal(layer, units, channels).kept(removed), channels, 24, units)
    refit = torch.linalg.lstsq(x[:, kept], x @ weight.T, driver="gelsd").solution.T
    assert (layer.refit(kept) - refit).abs().max() < 1e-9


@pytest.mark.parametrize("channels", [1, 4])
def test_sum_of_scores_is_the_true_error(channels: int) -> None:
    x, weight = problem()
    layer, units = Layer.of(weight, x.T @ x, damping=0.0), 24 // channels
    removal = greedy_removal(layer, units, channels)
    for removed in range(units):
        kept = columns_of(removal.kept(removed), channels, 24, units)
        refit = layer.refit(kept)
        true = float((x @ weight.T - x[:, kept] @ refit.T).square().sum())
        assert float(removal.errors[removed]) == pytest.approx(true, rel=1e-9, abs=1e-18)
        assert layer.error(kept, refit) == pytest.approx(true, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("channels", [1, 4])
def test_compensation_pays(channels: int) -> None:
    x, weight = problem()
    layer, units = Layer.of(weight, x.T @ x, damping=0.0), 24 // channels
    removal = greedy_removal(layer, units, channels)
    plain = removal_in_order(layer, removal.order, channels, compensate=False)
    half = units // 2
    kept = columns_of(removal.kept(half), channels, 24, units)
    assert float(plain.errors[half]) == pytest.approx(layer.error(kept, weight[:, kept]), rel=1e-9)
    assert plain.errors[half] > 1.2 * removal.errors[half]
    again = removal_in_order(layer, removal.order, channels)
    assert torch.allclose(again.errors, removal.errors, rtol=1e-9)


@pytest.mark.parametrize("channels", [1, 4])
def test_errors_along_any_order_are_those_of_the_refit(channels: int) -> None:
    x, weight = problem(25)
    layer, units = Layer.of(weight, x.T @ x), 24 // channels
    order = torch.randperm(units, generator=torch.Generator().manual_seed(1)).tolist()[:-1]
    removal = removal_in_order(layer, order, channels)
    assert removal.errors[0] == 0
    for count in range(1, units):
        kept = columns_of(removal.kept(count), channels, 25, units)
        assert float(removal.errors[count]) == pytest.approx(layer.error(kept, layer.refit(kept)), rel=1e-9)


def test_columns_behind_the_last_unit_stay() -> None:
    """The constant input of the bias is never a candidate."""
    x, weight = problem()
    layer = Layer.of(weight, x.T @ x, damping=0.0)
    removal = greedy_removal(layer, 23, 1)
    assert set(removal.order) < set(range(23))
    assert columns_of(removal.kept(22), 1, 24, 23).tolist()[-1] == 23


@pytest.mark.parametrize("channels", [1, 4])
def test_duplicated_and_dead_columns(channels: int) -> None:
    x, weight = problem()
    x[:, 5] = x[:, 4]
    x[:, 8:12] = 0
    units = 24 // channels
    for damping in (0.0, 1e-3):
        layer = Layer.of(weight, x.T @ x, damping)
        removal = greedy_removal(layer, units, channels)
        assert torch.isfinite(removal.errors).all()
        assert float(removal.errors[1]) == pytest.approx(0, abs=1e-9), "what is dead goes first and costs nothing"
        assert torch.isfinite(layer.refit(columns_of(removal.kept(units // 2), channels, 24, units))).all()


def test_fewer_rows_than_columns() -> None:
    x, weight = problem(rows=10)
    removal = greedy_removal(Layer.of(weight, x.T @ x), 24, 1)
    assert torch.isfinite(removal.errors).all()
    assert bool((removal.errors.diff() >= -1e-9).all())


def test_nothing_removed_is_the_weight_itself() -> None:
    x, weight = problem()
    layer = Layer.of(weight, x.T @ x)
    assert torch.equal(layer.refit(range(24)), weight)


def test_what_cannot_be_fitted_is_named() -> None:
    weight = torch.ones(2, 3)
    with pytest.raises(InputError, match=r"blocks\.0 are always zero"):
        Layer.of(weight, torch.zeros(3, 3), name="blocks.0")
    with pytest.raises(InputError, match=r"blocks\.0 are not finite"):
        Layer.of(weight, torch.full((3, 3), torch.nan), name="blocks.0")
    x, weight = problem()
    with pytest.raises(InputError, match="one has to stay"):
        greedy_removal(Layer.of(weight, x.T @ x), 24, 1).kept(24)
