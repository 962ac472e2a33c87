"""Bad input to MosaicDiff through the command line: one line, status 2, nothing left behind."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_prune import load
from lightning_prune.cli import main
from lightning_prune.data import fashion
from lightning_prune.diffusion.routing import StagedDenoiser
from tests.cli.test_bad_input import MODEL, refused

REPORT = "--trainer.callbacks=[{class_path: lightning_prune.callbacks.EfficiencyReport"
SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "mosaicdiff_dit.yaml"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([f"{MODEL}.target=1.5"], "model.target"),
        ([f"{MODEL}.target=0.9"], "the largest is"),
        ([f"{MODEL}.recipe.stages=9"], "9 stages of 4 sampling steps"),
        ([f"{MODEL}.recipe.allocation=best"], "allocation"),
        ([f"{MODEL}.steps=0"], "0 sampling steps"),
        ([f"{MODEL}.sampler=euler-maruyama"], "model.sampler"),
        ([f"{MODEL}.steps=1"], "2 stages of 1 sampling steps"),
        ([f"{MODEL}.recalibration_images=0"], "model.recalibration_images"),
        ([f"{MODEL}.recipe.match=maybe"], "match"),
        (["--data.init_args.batch_size=2"], "2 samples for 3 stages"),
        (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches: 0"),
        (["--trainer.max_epochs=0"], "trainer.max_epochs: 0"),
        (["--trainer.max_epochs=2"], "trainer.max_epochs: 2: calibration sees the data once"),
        (["--trainer.max_epochs=null", "--trainer.max_steps=5"], "trainer.max_epochs: -1"),
        (["--trainer.max_steps=0"], "trainer.max_steps: 0"),
        ([f"{MODEL}.steps=8"], "SampleGrid draws in 4 network calls"),
        ([f"{MODEL}.steps=8", f"{REPORT}, init_args: {{steps: 20}}}}]"], "EfficiencyReport draws in 20 network calls"),
        ([f"{MODEL}.calibration=sampler", f"{MODEL}.recipe.criterion=taylor"], "recipe.criterion 'taylor'"),
    ],
)
def test_the_line_names_what_is_wrong(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(arguments, capsys, tmp_path, SMOKE)


@pytest.mark.parametrize("steps", [1, 8])
def test_samplers_of_few_steps_have_the_published_stages_that_are_not_empty(steps: int, tmp_path: Path) -> None:
    few = [f"--model.steps={steps}", "--model.recipe={allocation: published, stages: null}", "--model.rivals={}"]
    quick = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0", "--trainer.callbacks=[]"]
    assert main(["fit", "--config", str(SMOKE), "--run.root", str(tmp_path), "--run.name", "run", *few, *quick]) == 0
    stages = load(tmp_path / "run" / "artifact")
    assert isinstance(stages, StagedDenoiser)
    assert sum(stages.lengths) == steps
    assert min(stages.lengths) >= 1


def test_a_network_whose_widths_cannot_be_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One head and one group of a norm: there is nothing to remove."""
    content = yaml.safe_load(SMOKE.read_text())
    content["model"]["init_args"]["denoiser"] = {
        "class_path": "lightning_prune.diffusion.models.unet2d.UNet2D",
        "init_args": {
            "config": {
                "sample_size": 32,
                "in_channels": 1,
                "out_channels": 1,
                "layers_per_block": 1,
                "block_out_channels": [4],
                "down_block_types": ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"],
                "norm_num_groups": 1,
                "attention_head_dim": 4,
                "num_class_embeds": 11,
            }
        },
    }
    (tmp_path / "single.yaml").write_text(yaml.safe_dump(content))
    assert "no width that can be cut" in refused([], capsys, tmp_path, tmp_path / "single.yaml")


def test_images_that_are_all_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with np.load(fashion.EMBEDDED_FILE) as arrays:
        constant = {name: np.full_like(a[:64], 7) if "images" in name else a[:64] for name, a in arrays.items()}
    np.savez(tmp_path / "constant.npz", **constant)
    monkeypatch.setattr(fashion, "EMBEDDED_FILE", tmp_path / "constant.npz")
    assert "all images of the first batch are equal" in refused([], capsys, tmp_path, SMOKE)
