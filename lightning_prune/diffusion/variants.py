"""A network as reports compare it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.solvers import Sampler


class Variant:
    """A row of a report: a network, and the sampler it is drawn with where that is not the report's own.

    A sampler of its own is what a control at equal cost has: the dense network with fewer steps.

    Args:
        denoiser: the network, or None where it is made when it is first asked for.
        sampler: its own sampler.
        make: makes the network of a row that few look at; it is kept for as long as the row is.
    """

    def __init__(
        self, denoiser: Denoiser | None, sampler: Sampler | None = None, make: Callable[[], Denoiser] | None = None
    ) -> None:
        self._given, self._make, self.sampler = denoiser, make, sampler

    @classmethod
    def later(cls, make: Callable[[], Denoiser]) -> Variant:
        """A row whose network is made by the process that asks for it, once."""
        return cls(None, make=make)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The network."""
        if self._given is not None:
            return self._given
        assert self._make is not None
        return self._make()
