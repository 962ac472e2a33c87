"""A structurally pruned network, fine-tuned from its artifact by another method: Diff-Pruning's second half."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from lightning_prune import load
from lightning_prune.cli import main
from lightning_prune.cli.export import build_module
from lightning_prune.cli.preflight import check
from lightning_prune.diffusion.pretrained import without_weights
from lightning_prune.methods.dense import Dense
from lightning_prune.metrics.macs import count_denoiser
from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.masks import select_units

CONFIGS = Path(__file__).parents[1] / "configs"


def fit(config: Path, root: Path, *options: str) -> int:
    return main(["fit", "--config", str(config), "--run.root", str(root), *options])


def test_a_pruned_artifact_is_fine_tuned_and_stored_as_slim(tmp_path: Path) -> None:
    report = "--trainer.callbacks.init_args"
    quick = (f"{report}.samples=120", f"{report}.steps=2", f"{report}.timed_images=4", f"{report}.timed_repeats=1")
    one_shot = CONFIGS / "baselines" / "one-network-taylor.yaml"
    options = ("--run.name=cut", "--model.target=0.455", "--data.batch_size=8", "--trainer.limit_train_batches=2")
    assert fit(one_shot, tmp_path, *options, *quick, f"{report}.fewer_steps=false") == 0
    cut = load(tmp_path / "cut" / "artifact")

    tuned = CONFIGS / "baselines" / "diff-pruning.yaml"
    options = ("--run.name=tuned", "--data.batch_size=8", "--trainer.max_steps=2", "--trainer.val_check_interval=2")
    source = f"--model.denoiser.path={tmp_path / 'cut' / 'artifact'}"
    assert main(["plan", "--config", str(tuned), source]) == 0
    few = ("--data.validation_samples=16", "--model.warmup_steps=1", f"{report}.fewer_steps=false")
    assert fit(tuned, tmp_path, *options, source, *quick, *few) == 0
    result = load(tmp_path / "tuned" / "artifact")

    before, after = cut.state_dict(), result.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    rows = {row["name"]: row for row in json.loads((tmp_path / "tuned" / "report.json").read_text())["rows"]}
    assert rows.keys() == {"dense", "small dense"}
    assert 0.5 < rows["small dense"]["macs_kept"] <= 0.545
    first = json.loads((tmp_path / "cut" / "report.json").read_text())["rows"][-1]
    assert first["macs_kept"] == rows["small dense"]["macs_kept"]


def test_an_artifact_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = f"--model.denoiser.path={tmp_path / 'nothing'}"
    assert fit(CONFIGS / "baselines" / "diff-pruning.yaml", tmp_path, missing) == 2
    assert "nothing" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "diff-pruning").exists()


def test_a_queue_is_told_of_a_missing_artifact(tmp_path: Path) -> None:
    config, missing = CONFIGS / "baselines" / "diff-pruning.yaml", tmp_path / "nothing"
    with pytest.raises(InputError, match=r"denoiser\.init_args\.path: .*nothing: no such file or folder"):
        check(["fit", "--config", str(config), f"--model.denoiser.path={missing}"])


@pytest.mark.parametrize("name", ["small-dense.yaml", "small-dense-unet.yaml"])
def test_small_networks_cost_about_what_two_four_leaves(name: str) -> None:
    with without_weights():
        module = build_module(yaml.safe_load((CONFIGS / "baselines" / name).read_text()))
        assert isinstance(module, Dense)
        assert module._teacher is not None
        dense, small = module._teacher.value, module.denoiser
        ledger = count_denoiser(dense)
        masked = select_units(dense.anatomy(), None, dense.default_dense(), 4)
        left = ledger.kept({unit.name: Sparsity(2, 4) for unit in masked})
        assert count_denoiser(small).macs() == pytest.approx(float(left), rel=0.1)
    assert module.inherited >= 0.8
