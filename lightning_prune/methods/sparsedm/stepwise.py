"""One set of weights whose pattern changes along the trajectory: dense where it matters, masked elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.protocols import InputError, PrunableUnit, Sparsity
from lightning_prune.pruning.masks import MaskSet

Patterns = Sequence[tuple[float, Sparsity | None]]


class _Stepwise(nn.Module):
    """The class of a denoiser under patterns by step has this in front of its family's."""

    masks: MaskSet
    patterns: Patterns
    _pattern: Sparsity | None

    def phase(self, index: int, calls: int) -> Sparsity | None:
        """The pattern of a call."""
        return [pattern for start, pattern in self.patterns if index >= start * calls][-1]

    def at_step(self, index: int, calls: int) -> None:
        """Put the pattern of the coming call into force."""
        wanted = self.phase(index, calls)
        if wanted != self._pattern:
            self.masks.set_sparsity(wanted)
            self._pattern = wanted


def stepwise(denoiser: Denoiser, units: Sequence[PrunableUnit], patterns: Patterns) -> Denoiser:
    """Turn `denoiser` into one whose pattern depends on the step, in place.

    Args:
        denoiser: the network; its layers are masked in place.
        units: the units to mask.
        patterns: (fraction, pattern) pairs: from that fraction of the calls on the pattern holds, None being dense.
            The first fraction is 0, and they rise.

    Raises:
        InputError: fractions that do not begin at 0, do not rise or leave [0, 1).
    """
    starts = [start for start, _ in patterns]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1:
        raise InputError(f"patterns: fractions {starts} have to begin at 0 and rise below 1")
    family = type(denoiser)
    denoiser.__class__ = type(f"Stepwise{family.__name__}", (_Stepwise, family), {})
    assert isinstance(denoiser, _Stepwise)
    denoiser.patterns, denoiser._pattern = list(patterns), patterns[0][1]
    denoiser.masks = MaskSet(denoiser.network, units, patterns[0][1])
    return denoiser
