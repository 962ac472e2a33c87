"""How one result is made: where the stages are, what is removed in each, and how the rest makes up for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_prune.protocols import InputError
from lightning_prune.pruning.recalibration import Match
from lightning_prune.pruning.stages import MAXIMUM

Allocator = Literal["published", "uniform", "measured", "evolution", "learned"]
Criterion = Literal["obs", "magnitude", "taylor", "diff-pruning", "random"]
Sensitivity = Literal["balanced", "final", "output", "layer"]
_MAXIMUM_SNR_WEIGHT = 0.1  # of the normalised score: what the gradient of the error says has to prevail


@dataclass(frozen=True)
class Recipe:
    """One way to prune.

    Args:
        allocation: "published" takes the sparsity of a stage from the noise schedule, the same for all its layers;
            "uniform" takes one for all stages; "measured" minimises measured errors by dynamic programming over stages
            and layers; "evolution" searches sparsities of stages by the drift of sampled images; "learned" optimises
            widths of stages and layers by gradient.
        stages: number of stages of equal length; null takes the early, middle and late stage of the published rule.
        criterion: what units go first: Optimal Brain Surgeon's error, the norm of their weights, the first-order change
            of the loss, that of Diff-Pruning over informative timesteps, or chance.
        compensate: refit the layers that read removed units.
        recalibrate: refit them, with their biases, once more in the order they run, on what they read in the pruned
            network; follows `compensate`.
        match: scale what recalibrated layers give until it follows the dense layers' one to one ("gain"), or varies as
            much ("power"), or leave it as least squares have it ("none").
        affine: refit biases with the weights when errors are predicted, too.
        nested: one order of removal for all stages, so that what a stage keeps contains what a slimmer one keeps.
        profile: sparsities of equal stages relative to each other, for "uniform"; (1.3, 1, 0.7) cuts early steps more.
        sparsity: share of units to remove on average, for "published" and "uniform", in place of a target in MACs.
        threshold: M of the published stages.
        snr_weight: lambda' of the published score.
        sensitivity: what "measured" weighs errors by: the error of the network's output ("output"), the drift of final
            images when one stage is pruned ("final"), a geometric mean of both that is nearer to the first
            ("balanced"), or errors of single layers ("layer").
        maximum: largest share of a width that may go.
        evaluations: candidates that "evolution" samples with, and steps that "learned" takes.

    Raises:
        InputError: values that contradict each other.
    """

    allocation: Allocator = "measured"
    stages: int | None = None
    criterion: Criterion = "obs"
    compensate: bool = True
    recalibrate: bool = True
    match: Match = "gain"
    affine: bool = False
    nested: bool = False
    profile: tuple[float, ...] | None = None
    sparsity: float | None = None
    threshold: float = 0.55
    snr_weight: float = 0.0
    sensitivity: Sensitivity = "balanced"
    maximum: float = MAXIMUM
    evaluations: int = 24

    def __post_init__(self) -> None:
        if self.sparsity is not None and self.allocation not in ("published", "uniform"):
            raise InputError(f"recipe.sparsity: the {self.allocation!r} allocation takes model.target instead")
        if self.sparsity is not None and not 0 <= self.sparsity <= self.maximum:
            raise InputError(f"recipe.sparsity: {self.sparsity:g} is not in [0, recipe.maximum = {self.maximum:g}]")
        if not 0 <= self.snr_weight <= _MAXIMUM_SNR_WEIGHT:
            raise InputError(f"recipe.snr_weight: {self.snr_weight:g} is not in [0, {_MAXIMUM_SNR_WEIGHT:g}]")
        if self.profile is not None:
            self._check_profile(self.profile)
        if self.affine and not self.compensate:
            raise InputError("recipe.affine: biases are refitted with the weights only; set compensate")
        if not 0 < self.maximum < 1:
            raise InputError(f"recipe.maximum: {self.maximum:g} is not in (0, 1)")
        if self.stages is not None and self.stages < 1:
            raise InputError(f"recipe.stages: {self.stages} is not positive")
        if not 0 < self.threshold <= 1:
            raise InputError(f"recipe.threshold: {self.threshold:g} is not in (0, 1]")
        if self.evaluations < 1:
            raise InputError(f"recipe.evaluations: {self.evaluations} is not positive")

    def _check_profile(self, profile: tuple[float, ...]) -> None:
        if self.allocation != "uniform" or self.sparsity is not None:
            raise InputError("recipe.profile: goes with the 'uniform' allocation and model.target")
        if self.stages != len(profile):
            raise InputError(f"recipe.profile: {len(profile)} values, but recipe.stages is {self.stages}")
        if not all(0 < part < math.inf for part in profile):
            raise InputError("recipe.profile: its values have to be positive and finite")

    @property
    def refits_biases(self) -> bool:
        """Whether layers that are cut get biases of their own."""
        return self.compensate and (self.affine or self.recalibrate)
