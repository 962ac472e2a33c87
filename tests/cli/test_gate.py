"""--gate: refused before the work, checked after it, status 3 when not met."""

from pathlib import Path

import pytest

from lightning_prune.cli import main

SMOKE = Path(__file__).parents[2] / "configs" / "smoke"
QUICK = ["--trainer.max_steps=1", "--run.wandb=disabled", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gate")
    common = ["--config", str(SMOKE / "sparsedm_dit.yaml"), "--run.root", str(root), "--run.name", "run", *QUICK]
    assert main(["fit", *common, "--gate", "fd_fashion<=1e9"]) == 0
    return root / "run" / "checkpoints" / "last.ckpt"


def test_status_3_and_one_line_when_not_met(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = checkpoint.parents[2]
    common = ["--config", str(SMOKE / "sparsedm_dit.yaml"), "--run.root", str(root), "--run.name", "run"]
    common += ["--trainer.limit_test_batches=2"]
    assert main(["test", *common, "--ckpt_path", str(checkpoint), "--gate", "fd_fashion<=1e-3"]) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "gate" in line]
    assert line.startswith("lightning_prune: gate not met: fd_fashion of sparsedm 2:4 is ")
    assert (root / "run" / "report-test.json").exists()
    assert sorted(p.name for p in root.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("config", "gate", "named"),
    [
        ("sparsedm_dit", "fid<=dense+0.5", "fid"),
        ("sparsedm_dit", "fd_fashion<=sparse+0.5", "sparse"),
        ("sparsedm_dit", "better", "better"),
        ("sparsedm_unet", "fd_fashion<=dense+1", "EfficiencyReport"),
    ],
)
def test_what_cannot_be_checked_is_refused_first(
    config: str, gate: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (SMOKE / f"{config}.yaml").read_text()
    copy = tmp_path / "x.yaml"
    copy.write_text(source if named != "EfficiencyReport" else source[: source.index("  callbacks:")])
    root = tmp_path / "runs"
    assert main(["fit", "--config", str(copy), "--run.root", str(root), *QUICK, "--gate", gate]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning_prune: error:")]
    assert named in line
    assert not root.exists()
