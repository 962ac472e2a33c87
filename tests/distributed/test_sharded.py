"""SparseDM and Dense under FSDP2 in two gloo processes, beside DDP: losses, masks, averages, checkpoints, reports."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

CONFIGS = Path(__file__).parents[2] / "configs" / "smoke"
REPORT = {
    "class_path": "lightning_prune.callbacks.EfficiencyReport",
    "init_args": {"samples": 120, "steps": 1, "protocol": "smoke", "timed_images": 2, "timed_repeats": 1},
}

INVARIANT = {"class_path": "lightning_prune.callbacks.MaskInvariant"}


def fit(root: Path, name: str, strategy: str, *arguments: str, config: str = "sparsedm_dit", **change: Any) -> Path:
    """Fit a smoke config in two processes of one thread each; its run folder."""
    content = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    content["run"] = {"root": str(root), "name": name, "wandb": "disabled"}
    content["trainer"] |= {"devices": 2, "strategy": strategy, "enable_progress_bar": False, **change}
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [sys.executable, "-m", "lightning_prune", "fit", "--config", str(file), *arguments],
        capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return root / name


def metrics(run: Path, *names: str) -> list[float]:
    with (run / "metrics.csv").open() as stream:
        return [float(row[name]) for row in csv.DictReader(stream) for name in names if row.get(name)]


def checkpoint(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return found


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.allclose(tensor, b[name], rtol=1e-4, atol=1e-5), name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def replicated(root: Path) -> Path:
    return fit(root, "ddp", "ddp", gradient_clip_val=0.5)


@pytest.fixture(scope="module")
def sharded(root: Path) -> Path:
    """With every callback of the smoke config: grids, distances and reports need the network in one piece."""
    return fit(root, "fsdp2", "fsdp2", gradient_clip_val=0.5)


def test_losses_and_masks(replicated: Path, sharded: Path) -> None:
    names = ("loss", "val_loss")
    assert metrics(sharded, *names) == pytest.approx(metrics(replicated, *names), rel=1e-4)
    assert metrics(sharded, "mask_violations") == [0.0] * 4
    assert metrics(sharded, "macs_kept_aten") == metrics(replicated, "macs_kept_aten")


def test_one_checkpoint_for_both(replicated: Path, sharded: Path, root: Path) -> None:
    """Weights, averages and optimizer states; and each goes on from the other's."""
    one, other = checkpoint(replicated), checkpoint(sharded)
    for key in ("state_dict", "current_model_state"):
        close(one[key], other[key])
    assert int(one["averaging_state"]["n_averaged"]) == int(other["averaging_state"]["n_averaged"])
    longer: dict[str, Any] = {"max_steps": 6, "callbacks": [REPORT], "gradient_clip_val": 0.5}
    a = fit(root, "to-fsdp2", "fsdp2", "--ckpt_path", str(replicated / "checkpoints" / "last.ckpt"), **longer)
    b = fit(root, "to-ddp", "ddp", "--ckpt_path", str(sharded / "checkpoints" / "last.ckpt"), **longer)
    for key in ("state_dict", "current_model_state"):
        close(checkpoint(a)[key], checkpoint(b)[key])


def test_the_artifact_is_whole_and_masked(replicated: Path, sharded: Path) -> None:
    import lightning_prune

    ours, theirs = (lightning_prune.load(run / "artifact").state_dict() for run in (sharded, replicated))
    assert {name for name, tensor in ours.items() if (tensor == 0).float().mean() == 0.5} == {
        name for name, tensor in theirs.items() if (tensor == 0).float().mean() == 0.5
    }
    rows = [json.loads((run / "report.json").read_text())["rows"] for run in (sharded, replicated)]
    for a, b in zip(*rows, strict=True):
        assert a["macs_per_image"] == b["macs_per_image"]
        assert a["nonzero_params"] == b["nonzero_params"]
        assert a["fd_fashion"]["value"] == pytest.approx(b["fd_fashion"]["value"], rel=0.05)


def test_a_convolutional_network(root: Path) -> None:
    import lightning_prune

    model = ("--model.init_args.decay", "0.01", "--model.init_args.ema_decay", "0.9")
    longer: dict[str, Any] = {
        "config": "sparsedm_unet",
        "max_steps": 4,
        "val_check_interval": 2,
        "callbacks": [INVARIANT],
    }
    runs = [fit(root, f"unet-{s}", s, *model, **longer) for s in ("ddp", "fsdp2")]
    ours, theirs = (metrics(run, "loss", "val_loss", "mask_violations") for run in runs)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert metrics(runs[1], "mask_violations") == [0.0] * 4
    for key in ("state_dict", "current_model_state"):
        close(*(checkpoint(run)[key] for run in runs))
    zeros = [{n: t == 0 for n, t in lightning_prune.load(r / "artifact").state_dict().items()} for r in runs]
    pruned = [name for name, zero in zeros[0].items() if zero.ndim == 4 and zero.float().mean() == 0.75]
    assert pruned  # convolutions at 1:4
    for name in pruned:
        assert (zeros[0][name] == zeros[1][name]).float().mean() > 0.999, name


def test_a_dense_method(root: Path) -> None:
    short: dict[str, Any] = {"callbacks": [REPORT], "limit_val_batches": 0}
    dense = [fit(root, f"dense-{s}", s, config="dense_dit", **short) for s in ("ddp", "fsdp2")]
    close(checkpoint(dense[0])["state_dict"], checkpoint(dense[1])["state_dict"])
