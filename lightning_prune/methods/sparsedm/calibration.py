"""Masks, patterns and weights from what the layers of the dense network read on calibration batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_prune.diffusion.conditions import Condition, move
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.methods.sparsedm.scores import MaskScores
from lightning_prune.protocols import InputError, Sparsity
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
from lightning_prune.pruning.layer_patterns import allocate
from lightning_prune.pruning.masks import MaskSet
from lightning_prune.pruning.obs import Layer

Reduce = Callable[[Tensor], Tensor]
CalibrationWeighting = Literal["loss", "logarithmic"]


@dataclass(frozen=True)
class Calibration:
    """How statistics are taken and used.

    Args:
        batches: training batches seen before training, at timesteps and conditions as the loss draws them. With
            `one_shot` the run's own batches are seen instead.
        damping: of the second moments, relative to their mean diagonal.
        weighting: of samples: "loss", as the loss weighs their timestep, or "logarithmic", more the noisier they
            are, as errors made early in sampling add up (OBS-Diff, Zhu et al. 2025; the constants are ours).
        compensate: refit every weight that stays to what the dense layer gave (Optimal Brain Surgeon), with zeros in
            place of those that go; "obs" masks are then chosen group by group under that compensation.

    Raises:
        InputError: values out of range.
    """

    batches: int = 16
    damping: float = 1e-2
    weighting: CalibrationWeighting = "loss"
    compensate: bool = False

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise InputError(f"model.calibration.batches: {self.batches} is not positive")
        if not 0 <= self.damping < math.inf:
            raise InputError(f"model.calibration.damping: {self.damping:g} is negative or not finite")
        if self.weighting not in get_args(CalibrationWeighting):
            raise InputError(f"model.calibration.weighting: {self.weighting!r} is neither loss nor logarithmic")


@dataclass(frozen=True)
class Allocation:
    """Patterns by layer under a budget, in place of one for all.

    Args:
        budget: fraction of the dense call's MACs (aten) that may be left; never exceeded.
        patterns: what a layer may take, "n:m"; with n == m it may stay dense. Those that do not divide a layer's
            inputs are not considered for it.
        sensitivity: what a pattern costs in a layer, compensated where the calibration compensates: "measured" is the
            error of the network's prediction with that layer alone pruned, on a calibration batch; "second-order" the
            share of the layer's own output lost.

    Raises:
        InputError: a budget outside (0, 1], or no pattern.
    """

    budget: float
    patterns: tuple[str, ...] = ("4:4", "3:4", "2:4", "1:4")
    sensitivity: Literal["measured", "second-order"] = "measured"

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise InputError(f"model.allocation.budget: {self.budget:g} is not in (0, 1]")
        if not self.patterns:
            raise InputError("model.allocation.patterns: give at least one pattern")
        self.parsed()

    def parsed(self) -> list[Sparsity]:
        """The patterns, each once."""
        return list(dict.fromkeys(Sparsity.parse(pattern) for pattern in self.patterns))


def logarithmic_weights(grid: Tensor, t: Tensor) -> Tensor:
    """Weights [B] of samples at timesteps `t` [B]: 1 - log(1 + i) / log(1 + T), i after the noisiest of `grid` [T]."""
    rising = grid.to(t.device, torch.float32).sort().values
    index = len(grid) - 1 - torch.searchsorted(rising, t.to(rising))
    return 1 - torch.log1p(index.clamp(min=0)) / math.log1p(len(grid))


class Statistics:
    """What calibration batches leave: second moments of every masked layer's inputs, and a batch to measure on.

    Args:
        denoiser: the network, masked by `masks`; while it is looked at it computes densely.
        masks: its masks.
        scores: what they are derived from.
        settings: how statistics are used.
        folder: where to map the moments from; null keeps them in memory.
    """

    def __init__(
        self, denoiser: Denoiser, masks: MaskSet, scores: MaskScores, settings: Calibration, folder: Path | None
    ) -> None:
        self.denoiser, self.masks, self.scores, self.settings = denoiser, masks, scores, settings
        units = [unit for unit in denoiser.anatomy() if unit.name in masks.layers]
        self.groups = input_groups(denoiser.network, units)
        self.curvature = Curvature(denoiser.network, self.groups, 1, folder)
        self._probe: tuple[Tensor, Tensor, Condition, Tensor] | None = None

    @torch.no_grad()
    def see(self, x_t: Tensor, t: Tensor, cond: Condition, weights: Tensor) -> None:
        """Add a noisy batch [B, ...] at timesteps [B], its samples weighted [B]."""
        bins = torch.zeros(len(x_t), dtype=torch.long)
        with _dense(self.denoiser, self.masks), self.curvature.collecting(bins, weights):
            self.denoiser(x_t, t, cond)
        if self._probe is None:
            self._probe = x_t, t, cond, weights

    def sum_over(self, reduce: Reduce) -> None:
        """Sum the moments over processes."""
        self.curvature.sum_over(reduce)

    def problem(self, name: str) -> Layer:
        """The least-squares problem of a layer."""
        group = next(group for group in self.groups if group.name == name)
        return layer_problem(self.denoiser.network, group, self.curvature, self.settings.damping)

    def scales(self) -> dict[str, Tensor]:
        """Column scales by layer, for scores that are calibrated; none for others."""
        if self.scores not in ("wanda", "obs"):
            return {}
        return {n: column_scale(self.problem(n), layer.weight, self.scores) for n, layer in self.masks.layers.items()}

    def pruned(self, problem: Layer, name: str, sparsity: Sparsity) -> Tensor:
        """The weight [m, n] of a layer under a pattern, compensated where that is asked for."""
        keep = mask_columns(self.masks.layers[name].derived_mask(sparsity)).cpu()
        if not self.settings.compensate:
            weight = problem.weight.clone()
            weight[:, : keep.shape[1]] *= keep
            return weight
        if self.scores == "obs":
            keep = obs_mask(problem, keep.shape[1], sparsity)
        return refit(problem, keep)

    def allocate(
        self, wanted: Allocation, macs: Mapping[str, int], total: int, average: Reduce
    ) -> tuple[dict[str, Sparsity], dict[str, dict[Sparsity, float]]]:
        """The pattern of every layer, and the errors they were chosen by.

        Args:
            wanted: budget and patterns.
            macs: of every layer in one dense call.
            total: of the network in one dense call.
            average: means of a tensor over processes.
        """
        found = {}
        for name, layer in self.masks.layers.items():
            fitting = [s for s in wanted.parsed() if layer.weight.shape[1] % s.m == 0]
            found[name] = dict.fromkeys(fitting or [Sparsity(1, 1)], 0.0)
        measure = self._measured if wanted.sensitivity == "measured" else self._lost
        for name, errors in found.items():
            sparse = [sparsity for sparsity in errors if not sparsity.is_dense]
            values = average(torch.tensor(measure(name, sparse), dtype=torch.float64)).tolist() if sparse else []
            errors.update(zip(sparse, values, strict=True))
        return allocate(found, {name: macs.get(name, 0) for name in found}, total, wanted.budget), found

    @torch.no_grad()
    def _measured(self, name: str, patterns: list[Sparsity]) -> list[float]:
        """Weighted mean squared change of the prediction with one layer alone under each pattern."""
        assert self._probe is not None
        device = next(self.denoiser.parameters()).device
        x_t, t, cond, weights = (move(part, device) for part in self._probe)
        layer, problem, errors = self.masks.layers[name], self.problem(name), []
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        with _dense(self.denoiser, self.masks):
            expected = self.denoiser(x_t, t, cond)
            for pattern in patterns:
                write_weight(layer, self.pruned(problem, name, pattern).to(layer.weight))
                change = (self.denoiser(x_t, t, cond) - expected).square().flatten(1).mean(1)
                errors.append(float((change * weights).sum() / weights.sum()))
                layer.load_state_dict(before)
        return errors

    def _lost(self, name: str, patterns: list[Sparsity]) -> list[float]:
        problem = self.problem(name)
        return [removal_error(problem, self.pruned(problem, name, pattern)) for pattern in patterns]

    def compensate(self) -> dict[str, float]:
        """Refit every masked layer in place under the patterns in force; the share of each one's output then lost."""
        lost = {}
        for name, layer in self.masks.layers.items():
            if layer.sparsity is not None:
                problem = self.problem(name)
                fitted = self.pruned(problem, name, layer.sparsity)
                lost[name] = removal_error(problem, fitted)
                write_weight(layer, fitted.to(layer.weight))
        return lost

    def state(self, reduce: Reduce | None) -> dict[str, Any]:
        """What a checkpoint taken between two batches holds; `reduce` where there are several processes."""
        return {**self.curvature.state(reduce), "probe": self._probe}

    def load(self, state: Mapping[str, Any], moments: bool) -> None:
        """Take over a state; its moments are those of all processes together, so one of them takes them."""
        self._probe = state["probe"]
        if moments:
            self.curvature.load(state)


@contextmanager
def _dense(denoiser: Denoiser, masks: MaskSet) -> Iterator[None]:
    """Evaluation mode without masks for a while."""
    patterns = {name: layer.sparsity for name, layer in masks.layers.items()}
    training = denoiser.training
    denoiser.eval()
    masks.set_sparsity(None)
    try:
        yield
    finally:
        for name, pattern in patterns.items():
            masks.layers[name].set_sparsity(pattern)
        denoiser.train(training)
