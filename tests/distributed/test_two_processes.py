"""Two gloo processes through the real command line: one run folder, masks that hold, one report."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "sparsedm_dit.yaml"


def test_ddp_fit_leaves_one_run(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "lightning_prune", "fit", "--config", str(SMOKE)),
        *("--run.root", str(tmp_path), "--run.name", "two", "--run.wandb", "disabled"),
        *("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.enable_progress_bar", "false"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p.name for p in tmp_path.iterdir()] == ["two"]
    with (tmp_path / "two" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {float(row["mask_violations"]) for row in rows if row["mask_violations"]} == {0.0}
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["dense", "one-shot 2:4", "sparsedm 2:4"]
