"""Widths as continuous variables that follow a gradient: soft gates on ranked units, and a penalty on MACs.

The unit at rank p in [0, 1) of the order of removal is multiplied by sigmoid((p - rho) / tau), where rho is the share
of the group's units that goes in that stage. The loss is the squared error of the prediction on states of the dense
network's trajectories, relative to the prediction, plus a penalty on MACs over the budget. Layers are not refitted
while widths are learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.diffusion.conditions import move
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.methods.mosaicdiff.sensitivity import Probe, steps_to_probe
from lightning_prune.protocols import WidthGroup
from lightning_prune.pruning.allocation import Problem, Removed
from lightning_prune.pruning.obs import Removal
from lightning_prune.pruning.stages import Stage

_TEMPERATURE = 0.05
_RATE = 0.1
_PENALTY = 100.0


@torch.enable_grad()
def learn(
    dense: Denoiser,
    probe: Probe,
    problem: Problem,
    removals: list[list[Removal]],
    stages: Sequence[Stage],
    budget: int,
    steps: int,
) -> Removed:
    """Units to remove within the budget, after `steps` optimizer steps of which each sees every stage."""
    device = probe.device
    start = min(0.9, 1 - budget / problem.dense_macs)
    logits = torch.full((len(stages), len(problem.groups)), torch.logit(torch.tensor(max(start, 0.02))).item())
    logits = logits.to(device).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=_RATE)
    costs = _costs(problem).to(device)
    for _ in range(steps):
        shares = problem.maximum * logits.sigmoid()
        over = (problem.dense_macs - budget - (shares * costs).sum()) / problem.dense_macs
        logits.grad = _gradient(_PENALTY * over.clamp(min=0) ** 2, logits)
        for number, stage in enumerate(stages):
            weight = stage.steps / sum(problem.steps)
            error = weight * _stage_error(dense, probe, problem, removals[number], stage, logits[number])
            logits.grad += _gradient(error, logits)
        optimizer.step()
    return _rounded(problem, logits.detach().cpu(), budget)


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    """Of the logits alone: the network's weights are not to be left with gradients."""
    return torch.autograd.grad(loss, logits)[0]


def _costs(problem: Problem) -> Tensor:
    """MACs of a sampling run that each group holds in each stage."""
    units = [group.units * macs for group, macs in zip(problem.groups, problem.unit_macs, strict=True)]
    return torch.tensor(problem.steps)[:, None] * torch.tensor(units, dtype=torch.float64)


def _stage_error(
    dense: Denoiser, probe: Probe, problem: Problem, orders: Sequence[Removal], stage: Stage, logits: Tensor
) -> Tensor:
    """Relative squared error of the prediction under a stage's gates."""
    shares = problem.maximum * logits.sigmoid()
    step = steps_to_probe(stage)[0]
    x, t, expected = probe.states(step)
    with _gated(dense.network, problem.groups, orders, shares):
        output = probe.predict(x, t, move(probe.cond, probe.device))
    return (output - expected).square().mean() / expected.square().mean()


@contextmanager
def _gated(
    network: nn.Module, groups: Sequence[WidthGroup], orders: Sequence[Removal], shares: Tensor
) -> Iterator[None]:
    with ExitStack() as stack:
        for number, (group, order) in enumerate(zip(groups, orders, strict=True)):
            gates = _gates(order, shares[number])
            hook = _Gate(gates.repeat_interleave(group.channels))
            stack.callback(network.get_submodule(group.output).register_forward_pre_hook(hook).remove)
        yield


class _Gate:
    """Multiplies the channels a layer reads."""

    def __init__(self, gates: Tensor) -> None:
        self.gates = gates

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        gates = self.gates.to(args[0].dtype)
        scaled = args[0] * (gates.view(1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else gates)
        return (scaled, *args[1:])


def _gates(order: Removal, share: Tensor) -> Tensor:
    """Gate of every unit [units]; the one that is removed last never closes."""
    rank = torch.ones(order.units, device=share.device)
    rank[list(order.order)] = torch.arange(order.units - 1, device=share.device) / order.units
    soft = torch.sigmoid((rank + 0.5 / order.units - share) / _TEMPERATURE)
    last = torch.zeros(order.units, dtype=torch.bool, device=share.device)
    last[next(iter(order.kept(order.units - 1)))] = True
    return torch.where(last, torch.ones_like(soft), soft)


def _rounded(problem: Problem, logits: Tensor, budget: int) -> Removed:
    """Whole units: the learned shares, all raised by as little as meets the budget."""

    def at(shift: float) -> Removed:
        shares = problem.maximum * (logits + shift).sigmoid()
        return [
            [
                min(problem.most(g), round(float(share) * group.units))
                for g, (group, share) in enumerate(zip(problem.groups, row, strict=True))
            ]
            for row in shares
        ]

    low, high = -5.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if problem.macs(at(middle)) <= budget else (middle, high)
    return at(high) if problem.macs(at(high)) <= budget else problem.everything()
