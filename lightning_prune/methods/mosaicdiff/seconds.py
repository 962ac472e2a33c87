"""What a unit of a width costs in seconds on this machine, for budgets of time instead of MACs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.routing import StagedDenoiser
from lightning_prune.metrics.latency import interleaved_medians
from lightning_prune.pruning.structural import Width, slim

_IMAGES = 16
_TURNS = 7


@dataclass(frozen=True)
class Costs:
    """Nanoseconds of a call of the dense network, and of each unit of its width groups in it."""

    call: int
    units: tuple[int, ...]


def measured_costs(dense: Denoiser) -> Costs:
    """Costs from calls of the dense network and of copies without half of one group's units, in turns.

    A group whose units take no measurable time costs nothing, so nothing of it is worth removing.
    """
    groups = list(dense.groups())
    halves = {group.name: Width(tuple(range(group.units - group.units // 2))) for group in groups}
    arms = {"": _call(dense)}
    for group in groups:
        network = slim(dense.network, groups, {group.name: halves[group.name]})
        arms[group.name] = _call(StagedDenoiser(dense, [network], [1]).eval())
    seconds = interleaved_medians(arms, _TURNS)
    saved = [max(0.0, seconds[""] - seconds[group.name]) / (group.units // 2) for group in groups]
    return Costs(round(seconds[""] * 1e9), tuple(int(unit * 1e9) for unit in saved))


def _call(denoiser: Denoiser) -> Callable[[], object]:
    device = next(denoiser.parameters()).device
    x = torch.zeros(_IMAGES, *denoiser.sample_shape, device=device)
    t, cond = torch.full((_IMAGES,), 500, device=device), denoiser.blank_condition(_IMAGES, device)
    return torch.no_grad()(lambda: denoiser(x, t, cond))
