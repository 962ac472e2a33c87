"""Diff-Pruning's importance of units (Fang et al. 2023, arXiv 2305.10924): first order, over informative timesteps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.protocols import WidthGroup

THRESHOLD = 0.05
"""Timesteps count up to the first whose loss is below this share of the largest one so far."""
EVERY = 10
"""The published code takes every timestep, at ten times the cost."""


@torch.enable_grad()
def diff_pruning(
    dense: Denoiser, groups: Sequence[WidthGroup], process: Process, x0: Tensor, cond: Condition, noise: Tensor
) -> dict[str, Tensor]:
    """Sum of |w * gradient| over all weights of a unit [units], by group.

    The gradient is that of the noise-prediction loss, added up over timesteps 0, 10, 20, ... of one batch under one
    noise, the clean end first; what the paper calls coupled are the cuts of a width group.

    Args:
        dense: the network.
        groups: its width groups.
        process: its process.
        x0: clean samples [B, ...].
        cond: their conditions.
        noise: their noise [B, ...].
    """
    names = sorted({cut.parameter for group in groups for cut in group.cuts})
    weights = [dense.network.get_parameter(name) for name in names]
    total, largest = [torch.zeros_like(weight) for weight in weights], 0.0
    for step in process.grid()[::EVERY]:
        t = step.expand(len(x0)).to(x0.device)
        predicted = dense(process.add_noise(x0, noise, t), t, cond)
        loss = mse_loss(predicted, process.target(x0, noise, t)) * _of_noise(process, t)
        largest = max(largest, now := float(loss.detach()))
        if now < THRESHOLD * largest:
            break
        for held, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
            held += gradient
    scored = {name: (w * g).detach().abs() for name, w, g in zip(names, weights, total, strict=True)}
    return {group.name: _by_unit(group, scored) for group in groups}


def _of_noise(process: Process, t: Tensor) -> float:
    """From the mean square error of the prediction at `t` [B], all the same, to that of the noise it implies."""
    signal, sigma = (float(part) for part in process.coefficients(t[:1], torch.zeros(1, device=t.device)))
    return {"epsilon": 1.0, "x0": (signal / sigma) ** 2}.get(process.prediction, signal**2)


def _by_unit(group: WidthGroup, scored: dict[str, Tensor]) -> Tensor:
    found = torch.zeros(group.units, dtype=torch.float64)
    for cut in group.cuts:
        along = scored[cut.parameter].double().cpu().movedim(cut.dim, 0)
        found += along.reshape(cut.repeats, group.units, -1).sum((0, 2))
    return found
