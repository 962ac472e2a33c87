"""One set of weights whose pattern changes along the trajectory: dense where it matters, masked elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.protocols import InputError, PrunableUnit, Sparsity
from lightning_prune.pruning.masks import MaskSet


class StepwiseSparsity(nn.Module):
    """A denoiser under a pattern that depends on the step.

    Args:
        denoiser: the network; its layers are masked in place.
        units: the units to mask.
        patterns: (fraction, pattern) pairs: from that fraction of the calls on the pattern holds, None being dense.
            The first fraction is 0, and they rise.

    Raises:
        InputError: fractions that do not begin at 0, do not rise or leave [0, 1).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        units: Sequence[PrunableUnit],
        patterns: Sequence[tuple[float, Sparsity | None]],
    ) -> None:
        super().__init__()
        starts = [start for start, _ in patterns]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1:
            raise InputError(f"patterns: fractions {starts} have to begin at 0 and rise below 1")
        self.denoiser, self.patterns = denoiser, list(patterns)
        self.masks = MaskSet(denoiser.network, units, patterns[0][1])
        self._now = patterns[0][1]
        self.sample_shape, self.num_classes = denoiser.sample_shape, denoiser.num_classes

    @property
    def network(self) -> nn.Module:
        """The network that computes."""
        return self.denoiser.network

    def null_condition(self, cond: Condition) -> Condition:
        """The condition that stands for "no class" or "no text"."""
        return self.denoiser.null_condition(cond)

    def phase(self, index: int, calls: int) -> Sparsity | None:
        """The pattern of a call."""
        return [pattern for start, pattern in self.patterns if index >= start * calls][-1]

    def at_step(self, index: int, calls: int) -> None:
        """Put the pattern of the coming call into force."""
        wanted = self.phase(index, calls)
        if wanted != self._now:
            self.masks.set_sparsity(wanted)
            self._now = wanted

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The denoiser's prediction under the present pattern."""
        prediction: Tensor = self.denoiser(x, t, cond)
        return prediction
