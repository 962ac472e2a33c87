"""What a whole image costs: the ledgers of every step of a trajectory, summed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.metrics.macs import Convention, Ledger, count_denoiser, macs_per_image
from lightning_prune.protocols import Sparsity, StepAware
from lightning_prune.pruning.masks import patterns_now


@dataclass(frozen=True)
class Phase:
    """Steps of equal cost: their ledger, the patterns of layers under a mask, and how many they are."""

    ledger: Ledger
    masks: dict[str, Sparsity]
    calls: int


@dataclass(frozen=True)
class TrajectoryCost:
    """The cost of one image.

    Attributes:
        phases: what its steps do, in the order in which each kind comes first.
        guidance: guidance scale; any but 1 doubles the calls.
    """

    phases: tuple[Phase, ...]
    guidance: float = 1.0

    def macs(self, convention: Convention = "aten") -> Fraction:
        """MACs of one image under masks."""
        parts = [macs_per_image(p.ledger.kept(p.masks, convention), p.calls, self.guidance) for p in self.phases]
        return sum(parts, Fraction(0))

    def masked_share(self, convention: Convention = "aten") -> Fraction:
        """MACs, counted dense, of layers under a mask over those of all layers, in [0, 1]."""
        masked = sum(p.calls * p.ledger.masked(p.masks, convention) for p in self.phases)
        total = sum(p.calls * p.ledger.macs(convention) for p in self.phases)
        return Fraction(masked, total)


def trajectory_cost(denoiser: Denoiser, process: Process, sampler: Sampler) -> TrajectoryCost:
    """Count one call of every phase of a trajectory, on the device the denoiser is on."""
    calls = sampler.calls(process)
    if not isinstance(denoiser, StepAware):
        return TrajectoryCost((_phase(denoiser, calls),), sampler.guidance)
    kinds = [denoiser.phase(index, calls) for index in range(calls)]
    found: list[Phase] = []
    for kind, count in Counter(kinds).items():  # in the order of first appearance, as caches need
        denoiser.at_step(kinds.index(kind), calls)
        found.append(_phase(denoiser, count))
    return TrajectoryCost(tuple(found), sampler.guidance)


def _phase(denoiser: Denoiser, calls: int) -> Phase:
    return Phase(count_denoiser(denoiser), patterns_now(denoiser.network), calls)
