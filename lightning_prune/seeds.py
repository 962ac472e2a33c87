"""Independent seeds from a run seed and positions, so nothing random depends on what was drawn before it."""

from __future__ import annotations

import os

import numpy as np

from lightning_prune.protocols import InputError


def run_seed() -> int:
    """The seed that `seed_everything` set for this process, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derive(*parts: int) -> int:
    """A 63-bit seed that is a pure function of `parts`. Raises `InputError` if one is negative."""
    if min(parts) < 0:
        raise InputError(f"seed: {min(parts)} is negative")
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
