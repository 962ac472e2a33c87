"""SparseDM and Dense under stages 1 to 3 of DeepSpeed in two gloo processes, beside DDP."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is missing; make deepspeed-test"
    ),
]
RAMP = {
    "class_path": "lightning_prune.callbacks.SparsityRamp",
    "init_args": {"chain": ["3:4", "2:4"], "reached_at": 0.5},
}
INVARIANT = {"class_path": "lightning_prune.callbacks.MaskInvariant"}
STAGES = (1, 2, 3)


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"class_path": "tests.distributed.zero_on_cpu.ZeroOnCPU", "init_args": {"stage": stage, **settings}}


def command(root: Path, name: str, strategy: Any, *arguments: str, config: str = "sparsedm_dit", **change: Any) -> Any:
    """Fit a smoke config in two processes of one thread each; what came of it."""
    content = yaml.safe_load((ROOT / "configs" / "smoke" / f"{config}.yaml").read_text())
    content["run"] = {"root": str(root), "name": name, "wandb": "disabled"}
    if config == "sparsedm_dit":
        content["model"]["init_args"]["decay"] = 0.05  # strong enough that a run without it differs
        content["trainer"]["callbacks"] = [RAMP, INVARIANT]
    content["trainer"] |= {"devices": 2, "strategy": strategy, "enable_progress_bar": False, **change}
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return subprocess.run(
        [sys.executable, "-m", "lightning_prune", "fit", "--config", str(file), *arguments], cwd=ROOT, check=False,
        capture_output=True, text=True, timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip


def fit(root: Path, name: str, strategy: Any, *arguments: str, **settings: Any) -> Path:
    done = command(root, name, strategy, *arguments, **{"gradient_clip_val": 0.5, **settings})
    assert done.returncode == 0, done.stderr[-4000:]
    return root / name


def metrics(run: Path, *names: str) -> list[float]:
    with (run / "metrics.csv").open() as stream:
        return [float(row[name]) for row in csv.DictReader(stream) for name in names if row.get(name)]


def checkpoint(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return found


def close(a: dict[Any, Any], b: dict[Any, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            close(value, b[name])
        elif isinstance(value, torch.Tensor):
            assert torch.allclose(value, b[name], rtol=1e-4, atol=1e-5), name


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Weights, averages and optimizer states of two checkpoints."""
    close(a["state_dict"], b["state_dict"])
    close(a["current_model_state"], b["current_model_state"])
    close(a["optimizer_states"][0]["state"], b["optimizer_states"][0]["state"])
    assert int(a["averaging_state"]["n_averaged"]) == int(b["averaging_state"]["n_averaged"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def replicated(root: Path) -> Path:
    return fit(root, "ddp", "ddp")


@pytest.fixture(scope="module")
def spread(root: Path) -> dict[int, Path]:
    return {stage: fit(root, f"zero{stage}", zero(stage)) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_masks(replicated: Path, spread: dict[int, Path], stage: int) -> None:
    names = ("loss", "val_loss")
    assert metrics(spread[stage], *names) == pytest.approx(metrics(replicated, *names), rel=1e-4)
    assert metrics(spread[stage], "mask_violations") == [0.0] * 4


@pytest.mark.parametrize("stage", STAGES)
def test_one_checkpoint_for_all(replicated: Path, spread: dict[int, Path], stage: int) -> None:
    same(checkpoint(replicated), checkpoint(spread[stage]))


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_saved_holds_the_pattern(replicated: Path, spread: dict[int, Path], stage: int) -> None:
    import lightning_prune

    ours, theirs = (lightning_prune.load(run / "artifact").state_dict() for run in (spread[stage], replicated))
    masked = {name for name, tensor in theirs.items() if (tensor == 0).float().mean() == 0.5}
    assert masked
    for name in masked:
        assert int(((ours[name].unflatten(1, (-1, 4)) != 0).sum(-1) > 2).sum()) == 0
        assert ((ours[name] == 0) == (theirs[name] == 0)).float().mean() > 0.999


def test_a_run_goes_on_under_another_stage(spread: dict[int, Path], root: Path) -> None:
    longer: dict[str, Any] = {"max_steps": 6, "limit_val_batches": 0}
    last = {stage: str(spread[stage] / "checkpoints" / "last.ckpt") for stage in STAGES}
    a = fit(root, "2-to-3", zero(3), "--ckpt_path", last[2], **longer)
    b = fit(root, "3-to-2", zero(2), "--ckpt_path", last[3], **longer)
    same(checkpoint(a), checkpoint(b))
    assert checkpoint(a)["global_step"] == 6


def test_small_weights_that_stage_3_keeps_whole(replicated: Path, root: Path) -> None:
    same(checkpoint(replicated), checkpoint(fit(root, "whole", zero(3, keep_whole=None))))


def test_accumulated_gradients_are_divided_once(root: Path) -> None:
    """Adam would not notice."""
    settings: dict[str, Any] = {
        "config": "dense_dit",
        "callbacks": [],
        "limit_val_batches": 0,
        "gradient_clip_val": None,
    }
    given = (
        *("--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.lr", "0.1"),
        *("--trainer.accumulate_grad_batches", "2", "--model.init_args.optimizer.momentum", "0.9"),
    )
    a, b = (fit(root, f"sgd-{name}", s, *given, **settings) for name, s in (("ddp", "ddp"), ("zero2", zero(2))))
    close(checkpoint(a)["state_dict"], checkpoint(b)["state_dict"])
    close(checkpoint(a)["optimizer_states"][0]["state"], checkpoint(b)["optimizer_states"][0]["state"])


def test_optimizers_of_whole_weights_are_refused(root: Path) -> None:
    done = command(root, "muon", zero(2), "--model.init_args.optimizer", "timm.optim.Muon")
    assert done.returncode == 2, done.stderr[-2000:]
    assert "model.optimizer: Muon under DeepSpeed" in done.stderr
