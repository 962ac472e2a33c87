"""Sparsity ramps: pure functions from an optimizer step to a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lightning_prune.protocols import InputError, Sparsity


def staged(step: int, total: int, chain: Sequence[Sparsity], reached_at: float) -> Sparsity:
    """The pattern at optimizer `step` (from 0) of a run of `total` steps.

    The patterns of `chain` before the last share the first `reached_at` of the run equally; the last one holds for
    the rest. The published chain of five with reached_at 0.8 changes at 0.2, 0.4, 0.6 and 0.8 of the run.
    A chain of one holds from the first step.
    """
    before_last = len(chain) - 1
    start_of_last = int(total * reached_at)
    if before_last == 0 or step >= start_of_last:
        return chain[-1]
    return chain[step * before_last // start_of_last]


def check_chain(chain: Sequence[Sparsity], reached_at: float) -> None:
    """Raise `InputError` for an empty chain, a density that rises along it, or a fraction outside [0, 1)."""
    if not chain:
        raise InputError("chain: give at least one pattern")
    for earlier, later in pairwise(chain):
        if later.density > earlier.density:
            raise InputError(f"chain: {later} after {earlier} is denser; a ramp only removes")
    if not 0 <= reached_at < 1:
        raise InputError(f"reached_at: {reached_at} is not in [0, 1), so the last pattern would never hold")
