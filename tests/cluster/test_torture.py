"""Stopped again and again, at steps that chance picks: `make torture`."""

from __future__ import annotations

import random

import pytest

from tests.cluster.runs import equal, left, signalled, started_again, undisturbed
from tests.cluster.slurm import Cluster

pytestmark = [pytest.mark.torture, pytest.mark.timeout(3600)]
STEPS = 60


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_ten_signals_lose_nothing(slow_rank: int, cluster: Cluster) -> None:
    at = sorted(random.Random(slow_rank).sample(range(1, STEPS - 8), 10))
    expected = undisturbed(cluster, f"whole-{slow_rank}", steps=STEPS)
    job, run = signalled(cluster, f"ten-{slow_rank}", at, steps=STEPS, seconds=0.2, slow_rank=slow_rank, extra=0.3)
    started_again(cluster, job, run, 10)
    assert equal(left(run), expected)
