"""Networks whose pattern is chosen while they run: one set of dense weights for several sparsities.

The artifact holds the weights as trained, before any mask, and says which layers are masked and how. Masks follow from
the weights, so any pattern can be put into force and taken away again without a reload.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.masks import (
    MaskSet,
    Pattern,
    Patterns,
    maskable_layers,
    masked_layers,
    parse_pattern,
    set_patterns,
)

KEY = "switchable"


def set_sparsity(denoiser: Denoiser, sparsity: Patterns) -> None:
    """Change the pattern of a network's masked layers in place, for every step; going back gives the same bits.

    Args:
        denoiser: what `load` gave of a switchable artifact.
        sparsity: "n:m" or (n, m) for all layers, None for dense, or these by regular expressions over names of layers.
            A layer whose input dimension is no multiple of m computes densely.

    Raises:
        InputError: a network without masks, no N:M, a pattern that divides no layer, an expression that matches none.
    """
    _put(denoiser, sparsity)
    if isinstance(denoiser, _ByStep):
        denoiser.__class__ = type(denoiser).__bases__[1]
        del denoiser.patterns, denoiser._now


def set_sparsity_by_step(denoiser: Denoiser, patterns: Sequence[tuple[float, Pattern]]) -> None:
    """Let the pattern depend on the step of the sampler from now on, in place; reports charge it for what it does.

    Args:
        denoiser: what `load` gave of a switchable artifact.
        patterns: (fraction, pattern) pairs: from that fraction of the network calls on the pattern holds, None being
            dense. The first fraction is 0, and they rise.

    Raises:
        InputError: what `set_sparsity` raises; fractions that do not begin at 0, do not rise or leave [0, 1).
    """
    starts = [start for start, _ in patterns]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1:
        raise InputError(f"patterns: fractions {starts} have to begin at 0 and rise below 1")
    for _, pattern in reversed(patterns):  # the first is in force then, and all are known to fit
        set_sparsity(denoiser, pattern)
    family: Any = type(denoiser)
    denoiser.__class__ = type(f"ByStep{family.__name__}", (_ByStep, family), {})
    assert isinstance(denoiser, _ByStep)
    denoiser.patterns = [(start, parse_pattern(pattern)) for start, pattern in patterns]
    denoiser._now = denoiser.patterns[0][1]


class _ByStep(nn.Module):
    """The class of a denoiser under patterns by step has this in front of its family's."""

    patterns: Sequence[tuple[float, Sparsity | None]]
    _now: Sparsity | None

    def phase(self, index: int, calls: int) -> Sparsity | None:
        """The pattern of a call."""
        return [pattern for start, pattern in self.patterns if index >= start * calls][-1]

    def at_step(self, index: int, calls: int) -> None:
        """Put the pattern of the coming call into force."""
        wanted = self.phase(index, calls)
        if index == 0 or wanted != self._now:
            _put(cast(Denoiser, self), wanted)
            self._now = wanted


def released(denoiser: Denoiser) -> dict[str, str | None]:
    """Make the masked layers dense in place; the patterns that were in force, by layer, None where it was dense.

    Raises:
        InputError: no masked layer, or masks that do not follow from the weights alone.
    """
    layers = maskable_layers(denoiser.network)
    if not masked_layers(denoiser.network):
        raise InputError("--format switchable: no layer is masked")
    fixed = [name for name, layer in layers.items() if not layer.follows_weight]
    if fixed:
        raise InputError(f"--format switchable: the mask of {fixed[0]} does not follow from its weights alone")
    patterns = {name: str(layer.sparsity) if layer.sparsity else None for name, layer in layers.items()}
    set_patterns(layers, None)
    return patterns


def masked(denoiser: Denoiser, patterns: Mapping[str, str | None]) -> Denoiser:
    """Mask the layers of a loaded network, in place, as the artifact says. Raises `InputError` for other layers."""
    units = {unit.name: unit for unit in denoiser.anatomy()}
    if unknown := sorted(patterns.keys() - units.keys()):
        raise InputError(f"{KEY}: {unknown[0]} is no layer of the network")
    MaskSet(denoiser.network, [units[name] for name in patterns], None)
    set_sparsity(denoiser, {re.escape(name): pattern for name, pattern in patterns.items()})
    return denoiser


def _put(denoiser: Denoiser, sparsity: Patterns) -> None:
    layers = maskable_layers(denoiser.network)
    if not layers:
        raise InputError("set_sparsity: no layer can be masked; export the checkpoint with --format switchable")
    set_patterns(layers, sparsity)
