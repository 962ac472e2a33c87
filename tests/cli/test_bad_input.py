"""Bad input: one line that names the key or the file, status 2, nothing written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from lightning_prune.cli import main
from lightning_prune.cli.errors import one_line_errors
from lightning_prune.data import fashion
from lightning_prune.export import save_artifact
from tests.factories import tiny_dit

SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "sparsedm_dit.yaml"
MODEL = "--model.init_args"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], root: Path, config: Path = SMOKE) -> str:
    """Run fit, check status, brevity and that nothing was written; return the line."""
    before = sorted(root.rglob("*"))
    status = main(["fit", "--config", str(config), "--run.root", str(root / "runs"), *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning_prune: error:")]
    assert status == 2
    assert len(lines) == 1
    assert sorted(root.rglob("*")) == before
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model=no.such.Class"], "no.such.Class"),
        (["--model=Nonsense"], "Nonsense"),
        ([f"{MODEL}.sparsity=5:4"], "5:4"),
        ([f"{MODEL}.layers=['blocks.*']"], "blocks.*"),
        ([f"{MODEL}.no_such_option=1"], "no_such_option"),
        ([f"{MODEL}.denoiser.init_args.weights=/no/such/folder"], "/no/such/folder"),
        ([f"{MODEL}.denoiser.init_args.weights=embedded:nothing"], "embedded:nothing"),
        (["--trainer.no_such_flag=1"], "no_such_flag"),
        (["--trainer.max_steps=many"], "max_steps"),
        (["--ckpt_path=/no/such.ckpt"], "/no/such.ckpt"),
        (["--ckpt_path=last"], "last"),
        (["--trainer.default_root_dir=x"], "run.root"),
        (["--model.init_args.seed=-1"], "-1"),
        (["--trainer.accelerator=gpu"], "gpu"),
        (["--data.init_args.batch_size=0"], "batch_size"),
        (["--trainer.precision=bf16-true"], "trainer.precision: bf16-true"),
        (["--trainer.precision=16-true"], "write 16-mixed"),
        (["--config=/no/such.yaml"], "/no/such.yaml"),
    ],
)
def test_the_line_names_what_is_wrong(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(arguments, capsys, tmp_path)


def test_a_ramp_in_the_config_that_rises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "rising.yaml"
    config.write_text(SMOKE.read_text().replace('["3:4", "2:4"]', '["2:4", "3:4"]'))
    assert "3:4 after 2:4" in refused([], capsys, tmp_path, config)


def test_weights_of_another_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_artifact(tiny_dit(), tmp_path / "stored", "dense", {})
    config = json.loads((tmp_path / "stored" / "config.json").read_text())
    (tmp_path / "stored" / "config.json").write_text(json.dumps({**config, "attention_head_dim": 32}))
    content = yaml.safe_load(SMOKE.read_text())
    content["model"]["init_args"]["denoiser"]["init_args"] = {"weights": str(tmp_path / "stored")}
    (tmp_path / "stored.yaml").write_text(yaml.safe_dump(content))
    line = refused([], capsys, tmp_path, tmp_path / "stored.yaml")
    assert "diffusion_pytorch_model.safetensors" in line
    assert "shape" in line


def test_damaged_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_artifact(tiny_dit(), tmp_path / "stored", "dense", {})
    file = tmp_path / "stored" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    line = refused([f"{MODEL}.denoiser.init_args.weights={tmp_path / 'stored'}"], capsys, tmp_path)
    assert str(file) in line


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_data_asset(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = tmp_path / "images.npz"
    if damage == "cut":
        asset.write_bytes(fashion.EMBEDDED_FILE.read_bytes()[:100_000])
    if damage == "flipped":
        content = bytearray(fashion.EMBEDDED_FILE.read_bytes())
        content[2_000_000] ^= 0xFF
        asset.write_bytes(content)
    monkeypatch.setattr(fashion, "EMBEDDED_FILE", asset)
    assert str(asset) in refused([], capsys, tmp_path)


def test_run_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert str(blocked) in refused(["--run.root", str(blocked / "runs")], capsys, tmp_path)


def test_a_checkpoint_of_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, tmp_path / "c.ckpt")
    assert "c.ckpt" in refused(["--ckpt_path", str(tmp_path / "c.ckpt")], capsys, tmp_path)


def test_no_traceback_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--config", str(SMOKE), "--run.root", str(tmp_path), f"{MODEL}.sparsity=5:4"]
    main(arguments)
    assert "Traceback" not in capsys.readouterr().err
    main([*arguments, "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_no_arguments_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: lightning_prune" in capsys.readouterr().out


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    assert "fitt" in capsys.readouterr().err


def test_export_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert main(["export", "--ckpt_path", "x.ckpt", "--output", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")


def placed(settings: dict[str, object]) -> dict[str, object]:
    """Settings of a report, those of its measurement where they belong."""
    own = {key: value for key, value in settings.items() if key in ("samples", "steps", "beside", "rows")}
    return {**own, "measurement": {key: value for key, value in settings.items() if key not in own}}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"samples": 1}, "samples: 1"),
        ({"extractor": "inceptoin"}, "inceptoin"),
        ({"extractor": "timm/no_such_network", "weights": "x"}, "no_such_network"),
        ({"extractor": "inception", "weights": "/no/such.safetensors"}, "/no/such.safetensors"),
        ({"extractor": "inception", "weights": "WRONG"}, "not the Inception weights"),
        ({"further": ["fid"]}, "further"),
        ({"beside": {"other": "/no/such/artifact"}}, "/no/such/artifact"),
        ({"lpips_weights": "/no/such.pth"}, "/no/such.pth"),
        ({"rows": ["dens"]}, "'dens' is none of dense, one-shot 2:4, sparsedm 2:4"),
    ],
)
def test_evaluation_that_cannot_be(
    settings: dict[str, object], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if settings.get("weights") == "WRONG":
        save_file({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "wrong.safetensors")
        settings = {**settings, "weights": str(tmp_path / "wrong.safetensors")}
    config = yaml.safe_load(SMOKE.read_text())
    name = "lightning_prune.callbacks.EfficiencyReport"
    config["trainer"]["callbacks"] = [{"class_path": name, "init_args": {"steps": 2, **placed(settings)}}]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    assert named in refused([], capsys, tmp_path, tmp_path / "x.yaml")


def test_a_reference_of_another_extractor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    config = yaml.safe_load(SMOKE.read_text())
    settings = {"samples": 100, "steps": 2, "reference": str(tmp_path / "other.npz"), "reference_samples": 5000}
    report = {"class_path": "lightning_prune.callbacks.EfficiencyReport", "init_args": placed(settings)}
    config["trainer"]["callbacks"] = [report]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    assert "other.npz: 2048 dimensions" in refused([], capsys, tmp_path, tmp_path / "x.yaml")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_batch_too_large_for_the_device(wrapped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> int:
        page = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB of which ..."
        try:
            raise torch.OutOfMemoryError(page)
        except torch.OutOfMemoryError as error:
            if wrapped:
                raise RuntimeError("a callback failed") from error
            raise

    assert one_line_errors(action, debug=False) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for named in ("data.batch_size", "trainer.precision", "Tried to allocate 2.50 GiB"):
        assert named in line
    assert "defect" not in line
