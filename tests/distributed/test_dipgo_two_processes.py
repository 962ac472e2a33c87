"""Two processes that share a batch find the gates of one that has it all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "dipgo_dit.yaml"


def gates(root: Path, processes: int) -> Any:
    name = f"fit-{processes}"
    command = [
        *(sys.executable, "-m", "lightning_prune", "fit", "--config", str(SMOKE), "--run.root", str(root)),
        *("--run.name", name, "--run.wandb", "disabled", "--trainer.enable_progress_bar", "false"),
        *("--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto"),
        *("--data.init_args.batch_size", str(4 // processes), "--trainer.callbacks", "[]"),
        *("--trainer.limit_val_batches", "0"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / name / "artifact" / "gates.json").read_text())


def test_two_processes_find_the_gates_of_one(tmp_path: Path) -> None:
    one, two = gates(tmp_path, 1), gates(tmp_path, 2)
    assert one == two
    assert any(0 in row for row in one["gates"])
