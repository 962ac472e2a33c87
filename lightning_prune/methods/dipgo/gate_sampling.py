"""From scores [T, N] to the gates of a training step.

*Budgeted*: every sample of a batch draws gates of its own, at a budget of its own. A gate is open with probability
sigmoid((s - tau c) / temperature), where c is the block's cost and tau, one a sample, is set so that the exact expected
cost is the budget: the Lagrangian form of the solver's problem. Some gates are shut from the first step on, so the
consistency loss has a gradient from the first step on, and no weight has to balance it with a cost. tau moves with the
scores: a gate gains only by what it is worth beyond the average at its price, for nearly all are worth something.

*Published*: every gate is open whose score is positive; nothing is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.blocks import BlockCosts, BlockGraph
from lightning_prune.pruning.gates import any_runs, expected_cost, released_closure, running, straight_through

_ROUNDS = 40


@dataclass(frozen=True)
class DrawnGates:
    """Gates of one training step.

    Attributes:
        run: which blocks run, [T, B, N] or [T, N]: 0 or 1 in value, with gradients to the scores.
        cost: kept fraction of MACs, with gradients to the scores.
        skipped_steps: expected share of steps that are skipped as a whole.
    """

    run: Tensor
    cost: Tensor
    skipped_steps: Tensor


def budgeted_gates(
    scores: Tensor, budgets: Tensor, uniforms: Tensor, graph: BlockGraph, costs: BlockCosts, temperature: float = 1.0
) -> DrawnGates:
    """Gates that keep `budgets` [B] in expectation, drawn with `uniforms` [B, T, N]."""
    prices = torch.tensor(costs.blocks, dtype=scores.dtype, device=scores.device)
    prices = prices / prices.mean()
    tau = threshold(scores, budgets, prices, graph, costs, temperature)
    probabilities = _open(scores, tau, prices, temperature)
    gates = straight_through(probabilities, (uniforms < probabilities).to(scores.dtype))
    expected = running(probabilities, graph)
    return DrawnGates(
        run=running(gates, graph).transpose(0, 1),
        cost=_trajectory_cost(expected, graph, costs).mean(),
        skipped_steps=1 - any_runs(expected[:, 1:], graph).mean(),
    )


def threshold(
    scores: Tensor, budgets: Tensor, prices: Tensor, graph: BlockGraph, costs: BlockCosts, temperature: float
) -> Tensor:
    """The price of cost tau [B] at which the expected kept fraction is each budget, differentiable in the scores.

    Found by bisection; its gradient is that of the implicit function, by a Newton step that is zero in value.
    """

    def cost(tau: Tensor) -> Tensor:
        return _trajectory_cost(running(_open(scores, tau, prices, temperature), graph), graph, costs)

    with torch.no_grad():
        reach = float(scores.abs().max()) / float(prices.min().clamp(min=1e-3)) + 40 * temperature
        low, high = torch.full_like(budgets, -reach), torch.full_like(budgets, reach)
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            dear = cost(middle) > budgets
            low, high = torch.where(dear, middle, low), torch.where(dear, high, middle)
    tau = ((low + high) / 2).requires_grad_()
    kept = cost(tau)
    (slope,) = torch.autograd.grad(kept.sum(), tau, retain_graph=True)
    return tau.detach() - (cost(tau.detach()) - kept.detach()) / slope.clamp(max=-1e-9)


def _open(scores: Tensor, tau: Tensor, prices: Tensor, temperature: float) -> Tensor:
    """Probabilities [B, T, N] of open gates at prices tau [B]."""
    return torch.sigmoid((scores - tau.view(-1, 1, 1) * prices) / temperature)


def _trajectory_cost(run: Tensor, graph: BlockGraph, costs: BlockCosts) -> Tensor:
    """Kept fraction [...] of rows [..., T, N]; the first step costs all."""
    rest = expected_cost(run[..., 1:, :], graph, costs)
    return (1 + rest.sum(dim=-1)) / run.shape[-2]


def published_gates(scores: Tensor, graph: BlockGraph, costs: BlockCosts, cascades: bool = True) -> DrawnGates:
    """Straight-through gates under the published closure, and the published sparsity loss as their cost.

    The loss is 1/T of the sum of closed keep gates times gamma, the share of a call that skipping the block saves
    with its cascade; the first step's row counts, too. Without `cascades` gamma is 1.
    """
    keep = torch.sigmoid(scores)
    hard = (scores > 0).to(scores.dtype)
    pairs = torch.stack([straight_through(1 - keep, 1 - hard), straight_through(keep, hard)], dim=-1)
    closed = torch.stack([released_closure(row, graph) for row in pairs])[..., 1]
    gamma = scores.new_tensor(costs.cascade_shares(graph) if cascades else [1.0] * len(graph))
    return DrawnGates(
        run=closed,
        cost=(closed * gamma).sum() / len(scores),
        skipped_steps=1 - any_runs(closed[1:].detach(), graph).mean(),
    )
