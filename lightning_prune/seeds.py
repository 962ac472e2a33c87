"""Independent seeds from a run seed and positions, so nothing random depends on what was drawn before it."""

from __future__ import annotations

import numpy as np


def derive(*parts: int) -> int:
    """A 63-bit seed that is a pure function of `parts` (non-negative integers)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
