"""Two processes that share a batch find the gates of one that has it all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.distributed
SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "dipgo_dit.yaml"


def found(root: Path, processes: int, *further: str) -> tuple[Any, torch.Tensor]:
    """Gates and scores of a search whose steps share a batch of four."""
    name = f"fit-{processes}{''.join(further)}"
    command = [
        *(sys.executable, "-m", "lightning_prune", "fit", "--config", str(SMOKE), "--run.root", str(root)),
        *("--run.name", name, "--run.wandb", "disabled", "--trainer.enable_progress_bar", "false"),
        *("--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto"),
        *("--data.init_args.batch_size", str(4 // processes), "--trainer.callbacks", "[]"),
        *("--trainer.limit_val_batches", "0", "--trainer.max_steps", "10", "--model.sampler.steps", "10"),
        *("--model.refine", "8", "--model.optimizer.lr", "0.3", "--model.further_budgets", "null", *further),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = torch.load(root / name / "checkpoints" / "last.ckpt", weights_only=True)
    gates = json.loads((root / name / "artifact" / "gates.json").read_text())["gates"]
    return gates, checkpoint["state_dict"]["pruner.scores"]


def test_two_processes_find_the_gates_of_one(tmp_path: Path) -> None:
    """Refined ones, of scores that training has moved: gates that are not those it began with."""
    (one, scores), (two, theirs) = found(tmp_path, 1), found(tmp_path, 2)
    assert scores.abs().max() > 1
    # Sums over samples are added in another order, which ten steps of Adam at this rate enlarge.
    torch.testing.assert_close(theirs, scores, rtol=0, atol=0.05)
    assert one == two
    untrained, _ = found(tmp_path, 1, "--model.optimizer.lr=0", "--model.refine=0")
    assert one != untrained
