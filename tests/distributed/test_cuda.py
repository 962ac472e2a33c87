"""Strategies over NCCL on two GPUs, which no CPU can stand in for; `make gpu-test`. Not run on any machine yet.

What one GPU can show is in tests/test_cuda_fits.py.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.distributed.smoke import INVARIANT, RAMP, fit, metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("cuda"), "ddp", "ddp", accelerator="gpu", callbacks=[RAMP, INVARIANT])


DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs DeepSpeed, which `make deepspeed-test` installs"
)


@pytest.mark.parametrize("strategy", ["fsdp2", *(pytest.param(f"zero{stage}", marks=DEEPSPEED) for stage in (1, 2, 3))])
def test_sharded_training_is_that_of_ddp(strategy: str, replicated: Path, tmp_path: Path) -> None:
    run = fit(tmp_path, strategy, strategy, accelerator="gpu", callbacks=[RAMP, INVARIANT])
    assert metrics(run, "loss", "val_loss") == pytest.approx(metrics(replicated, "loss", "val_loss"), rel=1e-3)
    assert set(metrics(run, "mask_violations")) == {0.0}


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_masks_hold_in_half_precision(precision: str, tmp_path: Path) -> None:
    """Under a loss scale, too, which only CUDA has."""
    run = fit(tmp_path, precision, "ddp", accelerator="gpu", precision=precision, callbacks=[RAMP, INVARIANT])
    assert set(metrics(run, "mask_violations")) == {0.0}
