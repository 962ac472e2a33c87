"""Two gloo processes through the real command line: one run folder, masks that hold, one report, equal results."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.protocols import Sparsity
from lightning_prune.pruning.nm import nm_mask, violations
from tests.factories import DIT_CONFIG

pytestmark = pytest.mark.distributed
SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "sparsedm_dit.yaml"


def run(verb: str, root: Path, processes: int, *arguments: str) -> Path:
    """Run a verb in `processes` processes of one thread each; the run's folder."""
    name = f"{verb}-{processes}"
    command = [
        *(sys.executable, "-m", "lightning_prune", verb, "--config", str(SMOKE)),
        *("--run.root", str(root), "--run.name", name, "--trainer.enable_progress_bar", "false"),
        *("--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto", *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root / name


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("fit", tmp_path_factory.mktemp("two"), 2, "--run.wandb", "disabled")


def test_ddp_fit_leaves_one_run(fitted: Path) -> None:
    assert [p.name for p in fitted.parent.iterdir() if p.name.startswith("fit")] == ["fit-2"]
    with (fitted / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {float(row["mask_violations"]) for row in rows if row["mask_violations"]} == {0.0}
    assert [row["name"] for row in report(fitted / "report.json")["rows"]] == ["dense", "one-shot 2:4", "sparsedm 2:4"]


def test_any_number_of_processes_finds_the_same_distance(fitted: Path, tmp_path: Path) -> None:
    given = ("--ckpt_path", str(fitted / "checkpoints" / "last.ckpt"), "--trainer.limit_test_batches", "2")
    one, two = (report(run("test", tmp_path, n, *given) / "report-test.json") for n in (1, 2))
    for a, b in zip(one["rows"], two["rows"], strict=True):
        for key in ("value", "low", "high"):
            assert a["fd_fashion"][key] == pytest.approx(b["fd_fashion"][key], rel=1e-9)
    assert one["comparisons"] == two["comparisons"]


def test_any_number_of_processes_draws_the_same_files(fitted: Path, tmp_path: Path) -> None:
    given = ("--ckpt_path", str(fitted / "checkpoints" / "last.ckpt"), "--data.init_args.validation_samples", "21")
    one, two = (
        {p.name: p.read_bytes() for p in (run("predict", tmp_path, n, *given) / "predictions").iterdir()}
        for n in (1, 2)
    )
    assert len(one) == 21
    assert one == two


def report(file: Path) -> Any:
    return json.loads(file.read_text())


def test_decay_is_added_once_whatever_the_number_of_processes(tmp_path: Path) -> None:
    """With no loss to speak of, pruned weights shrink by lr * lambda a step and the others stay."""
    sgd = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.5", "--model.optimizer.weight_decay", "0")
    quiet = ("--model.noise_weight", "1e-30", "--model.distill_weight", "0", "--model.ema_decay", "null")
    decay = ("--model.decay", "0.2")
    off = ("--run.wandb", "disabled", "--trainer.callbacks", "null", "--trainer.limit_val_batches", "0")
    one, two = (
        torch.load(run("fit", tmp_path, n, *sgd, *quiet, *decay, *off) / "checkpoints" / "last.ckpt", weights_only=True)
        for n in (1, 2)
    )
    assert all(torch.equal(tensor, two["state_dict"][name]) for name, tensor in one["state_dict"].items())
    name = "denoiser.network.transformer_blocks.0.attn1.to_q.weight"
    pl.seed_everything(0)
    start = DiT(config=DIT_CONFIG).network.get_parameter(name.removeprefix("denoiser.network.")).detach()
    mask = nm_mask(start, Sparsity(2, 4))
    torch.testing.assert_close(one["state_dict"][name], torch.where(mask, start, start * 0.9**4))


def test_two_processes_calibrate_together(tmp_path: Path) -> None:
    """Patterns, weights and budget hold when statistics come from two processes."""
    how = ("--model.one_shot", "true", "--model.mask_scores", "obs", "--model.calibration.compensate", "true")
    once = ("--trainer.max_steps", "-1", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2")
    epoch = ("--trainer.val_check_interval", "null", "--trainer.check_val_every_n_epoch", "1")
    off = ("--run.wandb", "disabled", "--trainer.callbacks", "null", "--trainer.limit_val_batches", "0")
    found = run("fit", tmp_path, 2, *how, *once, *epoch, *off, "--model.allocation.budget", "0.6")
    written = json.loads((found / "artifact" / "allocation.json").read_text())
    assert 0.5 < written["macs_kept"] <= 0.6
    checkpoint = torch.load(found / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["calibrated"]["patterns"] == written["patterns"]
    for name, text in written["patterns"].items():
        weight = checkpoint["state_dict"][f"denoiser.network.{name}.weight"]
        assert violations(weight, Sparsity.parse(text)) == 0
