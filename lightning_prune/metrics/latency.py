"""Seconds, measured interleaved: arms take turns, so drift of the machine falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_seconds(arms: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, list[float]]:
    """Seconds of each of `repeats` calls of every arm, after one warm-up call each, in turns."""
    for call in arms.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, call in arms.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved_medians(arms: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of a call by arm; see `interleaved_seconds`."""
    return {name: statistics.median(times) for name, times in interleaved_seconds(arms, repeats).items()}
