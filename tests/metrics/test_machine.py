"""What a result was computed with, on systems that say less about themselves."""

import pytest
import torch

from lightning_prune.cli.bench_text import _machine
from lightning_prune.metrics.machine import machine


def test_a_system_without_a_load_average_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.getloadavg")
    monkeypatch.delattr("os.sched_getaffinity")
    found = machine(torch.device("cpu"))
    assert found["load_average"] is None
    assert found["cores"] >= 1
    assert "load average" not in _machine(found)
