"""From scores [T, N] to the gates of a training step.

*Budgeted*: every sample of a batch draws gates of its own, at a budget of its own, for whole steps and for the blocks
of those that run. A gate is open with probability sigmoid((s - tau c) / temperature), where c is what it pays for and
tau, one a sample, is set so that the exact expected cost is the budget: the Lagrangian form of the solver's problem.
Some gates are shut from the first step on, so the consistency loss has a gradient from the first step on, and no weight
has to balance it with a cost. tau moves with the scores: a gate gains only by what it is worth beyond the average at
its price, for nearly all are worth something.

*Published*: every gate is open whose score is positive; nothing is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.blocks import BlockCosts, BlockGraph
from lightning_prune.pruning.gates import any_runs, expected_cost, released_closure, running, straight_through

_ROUNDS = 40
_FIRST = 1e3  # worth of a step that a schedule has before all others


@dataclass(frozen=True)
class DrawnGates:
    """Gates of one training step.

    Attributes:
        run: which blocks run where the step runs at all, [T, B, N] or [T, N]: 0 or 1 in value, with gradients.
        steps: gates of whole steps [T, B], likewise; None opens all.
        cost: kept fraction of MACs, with gradients to the scores.
        skipped_steps: expected share of steps that are skipped as a whole.
    """

    run: Tensor
    steps: Tensor | None
    cost: Tensor
    skipped_steps: Tensor


def budgeted_gates(
    scores: Tensor, budgets: Tensor, uniforms: Tensor, graph: BlockGraph, costs: BlockCosts, temperature: float = 1.0
) -> DrawnGates:
    """Gates that keep `budgets` [B] in expectation.

    Args:
        scores: of blocks [T, N], or with a last column for whole steps [T, N + 1].
        budgets: fractions of MACs.
        uniforms: random numbers [B, *scores.shape] in [0, 1).
        graph: the blocks.
        costs: what they cost.
        temperature: of the gates.
    """
    prices = _prices(scores, costs)
    tau = threshold(scores, budgets, prices, graph, costs, temperature)
    probabilities = torch.sigmoid(logits(scores, tau, prices, temperature))
    hard = uniforms < probabilities
    if scores.shape[-1] > len(graph):
        hard[:, 1:, -1] = systematic(probabilities[:, 1:, -1], uniforms[:, 0, -1])
    blocks, steps = _parted(straight_through(probabilities, hard.to(scores.dtype)), graph)
    expected, whole = _parted(probabilities, graph)
    runs = any_runs(running(expected, graph), graph) * (1 if whole is None else whole)
    return DrawnGates(
        run=running(blocks, graph).transpose(0, 1),
        steps=None if steps is None else steps.transpose(0, 1),
        cost=_trajectory_cost(probabilities, graph, costs).mean(),
        skipped_steps=1 - runs[:, 1:].mean(),
    )


@torch.no_grad()
def systematic(probabilities: Tensor, phase: Tensor) -> Tensor:
    """Draws [..., T] with these probabilities, as evenly spread as they allow, from one number in [0, 1) each [...].

    Systematic sampling (Madow 1949): a draw falls where the sum of probabilities passes a whole number. Drawn one by
    one, steps would leave gaps that no good schedule has.
    """
    passed = (probabilities.double().cumsum(dim=-1) + phase.double().unsqueeze(-1)).floor()
    before = torch.cat([phase.double().unsqueeze(-1).floor(), passed[..., :-1]], dim=-1)
    return passed > before


def budgeted_scores(
    scores: Tensor, budget: float, graph: BlockGraph, costs: BlockCosts, temperature: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """What the solver maximises at a budget: worth of blocks [T, N], and of steps [T] or None.

    Probabilities of steps are a density over the trajectory, so the steps that run before all others are its systematic
    draw that goes on from the first step; the solver pays for their blocks, and for others with what is left. Worth is
    the log-likelihood of a row, but for a constant: of an open step and its open blocks, or of a shut step.
    """
    prices = _prices(scores, costs)
    tau = price_of_cost(scores, scores.new_tensor([budget]), prices, graph, costs, temperature)
    found, steps = _parted(logits(scores.detach(), tau, prices, temperature)[0], graph)
    if steps is None:
        return found, None
    drawn = systematic(torch.sigmoid(steps[1:]), steps.new_tensor(1e-6))
    first = torch.cat([drawn.new_ones(1), drawn]) * _FIRST
    return found, steps + first - torch.nn.functional.softplus(found).sum(dim=-1)


def threshold(
    scores: Tensor, budgets: Tensor, prices: Tensor, graph: BlockGraph, costs: BlockCosts, temperature: float
) -> Tensor:
    """The price of cost tau [B] at which the expected kept fraction is each budget, differentiable in the scores.

    Its gradient is that of the implicit function, by a Newton step that is zero in value.
    """

    def cost(tau: Tensor) -> Tensor:
        return _trajectory_cost(torch.sigmoid(logits(scores, tau, prices, temperature)), graph, costs)

    tau = price_of_cost(scores, budgets, prices, graph, costs, temperature).requires_grad_()
    kept = cost(tau)
    (slope,) = torch.autograd.grad(kept.sum(), tau, retain_graph=True)
    return tau.detach() - (cost(tau.detach()) - kept.detach()) / slope.clamp(max=-1e-9)


@torch.no_grad()
def price_of_cost(
    scores: Tensor, budgets: Tensor, prices: Tensor, graph: BlockGraph, costs: BlockCosts, temperature: float
) -> Tensor:
    """tau [B] of `threshold` without a gradient, by bisection."""
    reach = scores.abs().max().double() / prices.min().clamp(min=1e-3).double() + 40 * temperature
    high = reach.to(budgets).expand_as(budgets)
    low = -high
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        gates = torch.sigmoid(logits(scores, middle, prices, temperature))
        dear = _trajectory_cost(gates, graph, costs) > budgets
        low, high = torch.where(dear, middle, low), torch.where(dear, high, middle)
    return (low + high) / 2


def logits(scores: Tensor, tau: Tensor, prices: Tensor, temperature: float) -> Tensor:
    """Of open gates [B, *scores.shape] at prices tau [B]."""
    return (scores - tau.view(-1, 1, 1) * prices) / temperature


def _prices(scores: Tensor, costs: BlockCosts) -> Tensor:
    """What a gate costs, in mean blocks; that of a step is for all of them."""
    blocks = torch.tensor(costs.blocks, dtype=scores.dtype, device=scores.device)
    whole = [costs.dense] * (scores.shape[-1] - len(costs.blocks))
    return torch.cat([blocks, blocks.new_tensor(whole)]) / blocks.mean()


def _parted(gates: Tensor, graph: BlockGraph) -> tuple[Tensor, Tensor | None]:
    """Gates [..., N] of blocks, and [...] of whole steps if there are any."""
    blocks = gates[..., : len(graph)]
    return blocks, gates[..., -1] if gates.shape[-1] > len(graph) else None


def _trajectory_cost(gates: Tensor, graph: BlockGraph, costs: BlockCosts) -> Tensor:
    """Expected kept fraction [...] of gates [..., T, N (+ 1)]; the first step costs all."""
    blocks, steps = _parted(gates[..., 1:, :], graph)
    rest = expected_cost(running(blocks, graph), graph, costs)
    rest = rest if steps is None else rest * steps
    return (1 + rest.sum(dim=-1)) / gates.shape[-2]


def published_gates(scores: Tensor, graph: BlockGraph, costs: BlockCosts, cascades: bool = True) -> DrawnGates:
    """Straight-through gates under the published closure, and the published sparsity loss as their cost.

    The loss is 1/T of the sum of closed keep gates times gamma, the share of a call that skipping the block saves
    with its cascade; the first step's row counts, too. Without `cascades` gamma is 1.
    """
    keep = torch.sigmoid(scores)
    hard = (scores > 0).to(scores.dtype)
    pairs = torch.stack([straight_through(1 - keep, 1 - hard), straight_through(keep, hard)], dim=-1)
    # On the CPU: many steps on few numbers, each of which a device would be waited for.
    closed = torch.stack([released_closure(row, graph) for row in pairs.cpu()])[..., 1].to(scores.device)
    gamma = scores.new_tensor(costs.cascade_shares(graph) if cascades else [1.0] * len(graph))
    return DrawnGates(
        run=closed,
        steps=None,
        cost=(closed * gamma).sum() / len(scores),
        skipped_steps=1 - any_runs(closed[1:].detach(), graph).mean(),
    )
