"""A network as reports compare it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.solvers import Sampler


@dataclass(frozen=True)
class Variant:
    """A row of a report: a network, and the sampler it is drawn with where that is not the report's own.

    A sampler of its own is what a control at equal cost has: the dense network with fewer steps.
    """

    denoiser: Denoiser
    sampler: Sampler | None = None
