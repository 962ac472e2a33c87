"""SparseDM and Dense under FSDP2 in two gloo processes, beside DDP: losses, masks, averages, checkpoints, reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.smoke import INVARIANT, RAMP, checkpoint, close, fit, metrics

pytestmark = pytest.mark.distributed
REPORT = {
    "class_path": "lightning_prune.callbacks.EfficiencyReport",
    "init_args": {"samples": 120, "steps": 1, "protocol": "smoke", "timed_images": 2, "timed_repeats": 1},
}


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


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    both = ("--model.class_path", "tests.distributed.smoke.BothShares", "--data.init_args.batch_size", "16")
    return fit(root, "alone", "auto", *both, devices=1, gradient_clip_val=0.5, callbacks=[RAMP, INVARIANT])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(strategy: str, alone: Path, request: pytest.FixtureRequest) -> None:
    """On equal samples and noise: losses, and what they come to in weights and averages."""
    run = request.getfixturevalue({"ddp": "replicated", "fsdp2": "sharded"}[strategy])
    for name in ("loss", "val_loss", "denoise_loss", "distill_loss"):
        found = metrics(run, name)
        assert len(found) >= 2
        assert found == pytest.approx(metrics(alone, name), rel=1e-4), name
    for key in ("state_dict", "current_model_state"):
        close(checkpoint(run)[key], checkpoint(alone)[key])


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
