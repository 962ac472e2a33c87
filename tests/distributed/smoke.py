"""A smoke config in two processes of one thread each, through the command line, and what it leaves."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_prune.methods.sparsedm import SparseDM
from lightning_prune.module import Batch
from lightning_prune.seeds import derive

ROOT = Path(__file__).parents[2]
RAMP = {
    "class_path": "lightning_prune.callbacks.SparsityRamp",
    "init_args": {"chain": ["3:4", "2:4"], "reached_at": 0.5},
}
INVARIANT = {"class_path": "lightning_prune.callbacks.MaskInvariant"}


class BothShares(SparseDM):
    """One process that computes what two would: their samples, their noise and the mean of their gradients."""

    def step_generator(self, stream: int, index: int) -> torch.Generator:
        self._position = (stream, index)
        return super().step_generator(stream, index)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        stream, index = self._position
        found = []
        for rank in range(2):
            own = torch.Generator().manual_seed(derive(self.seed, stream, index, rank))
            found.append(super().loss({name: share(value, rank, self.training) for name, value in batch.items()}, own))
        mean = (found[0][0] + found[1][0]) / 2
        if self.training:  # while training, the first of two processes logs its own loss
            mean = found[0][0].detach() + mean - mean.detach()
        return mean, found[0][1]


def share(values: torch.Tensor, rank: int, training: bool) -> torch.Tensor:
    """What a process of two gets of a global batch: samples in turn, or whole batches where nothing is shuffled."""
    return values[rank::2] if training else values.chunk(2)[rank]


def command(
    root: Path,
    name: str,
    strategy: Any,
    *arguments: str,
    config: str = "sparsedm_dit",
    environment: Mapping[str, str] | None = None,
    **change: Any,
) -> subprocess.CompletedProcess[str]:
    """Fit a config under a strategy; `change` is for its trainer."""
    content = yaml.safe_load((ROOT / "configs" / "smoke" / f"{config}.yaml").read_text())
    content["run"] = {"root": str(root), "name": name, "wandb": "disabled"}
    content["trainer"] |= {"devices": 2, "strategy": strategy, "enable_progress_bar": False, **change}
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return subprocess.run(
        [sys.executable, "-m", "lightning_prune", "fit", "--config", str(file), *arguments], cwd=ROOT, check=False,
        capture_output=True, text=True, timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )  # fmt: skip


def fit(root: Path, name: str, strategy: Any, *arguments: str, **settings: Any) -> Path:
    """The run folder of a `command` that has to end well."""
    done = command(root, name, strategy, *arguments, **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    return root / name


def metrics(run: Path, *names: str) -> list[float]:
    """Logged values, in order."""
    with (run / "metrics.csv").open() as stream:
        return [float(row[name]) for row in csv.DictReader(stream) for name in names if row.get(name)]


def checkpoint(run: Path) -> dict[str, Any]:
    """The last one."""
    found: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return found


def close(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> None:
    """Tensors of both, nested or not, agree within rounding."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            close(value, b[name])
        elif isinstance(value, torch.Tensor):
            assert torch.allclose(value, b[name], rtol=1e-4, atol=1e-5), name
