"""Seconds, measured interleaved: arms take turns, so drift of the machine falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved_seconds(arms: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, list[float]]:
    """Seconds of each of `repeats` calls of every arm, after one warm-up call each, in turns."""
    for call in arms.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats):
        # Every other turn in reverse, so none always runs behind the same one.
        for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:
            start = _now()
            arms[name]()
            seconds[name].append(_now() - start)
    return seconds


def _now() -> float:
    """The clock, once the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved_medians(arms: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of a call by arm; see `interleaved_seconds`."""
    return {name: statistics.median(times) for name, times in interleaved_seconds(arms, repeats).items()}
