"""Data that cannot be used: one line that names the file, status 2, nothing written; damage that may be skipped."""

import logging
from pathlib import Path

import pytest
import yaml

from lightning_prune.cli import main
from tests.data.pictures import damage, write_pictures

SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "dense_dit.yaml"
NETWORK = (
    "--model.init_args.denoiser.init_args.config={sample_size: 8, patch_size: 4, in_channels: 3, out_channels: 3, "
    "num_layers: 1, num_attention_heads: 2, attention_head_dim: 16, num_embeds_ada_norm: %d}"
)


def command(root: Path, *more: str, classes: int = 3) -> list[str]:
    """Two steps of a small network on the pictures in `root/pictures`."""
    return [
        "fit",
        f"--config={SMOKE}",
        NETWORK % classes,
        f"--run.root={root / 'runs'}",
        "--trainer.callbacks=null",
        "--data=lightning_prune.data.ImageFolder",
        f"--data.root={root / 'pictures'}",
        "--data.size=8",
        "--data.batch_size=8",
        "--data.kept=0.2",
        *more,
    ]


def refused(arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run it; check status, brevity and that nothing was written; return the line."""
    before = sorted(root.rglob("*"))
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning_prune: error:")]
    assert sorted(root.rglob("*")) == before
    return line


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "pictures", count=30)
    return tmp_path


def test_a_folder_of_pictures_trains(root: Path) -> None:
    assert main(command(root)) == 0
    assert (root / "runs" / "smoke-dense-dit" / "artifact").is_dir()


def test_the_number_of_classes_is_compared_with_the_network(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(command(root, classes=10), root, capsys)
    assert "3 classes" in line
    assert "built for 10" in line
    assert str(root / "pictures") in line
    assert "no classes" in refused(command(root, "--data.labels=none"), root, capsys)


def test_class_count_against_a_checkpoint(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(root, "--run.name=first")) == 0
    stored = root / "runs" / "first" / "artifact"
    write_pictures(root / "pictures", count=4, classes=4)
    content = yaml.safe_load(SMOKE.read_text())
    content["model"]["init_args"]["denoiser"]["init_args"] = {"weights": str(stored)}
    (root / "stored.yaml").write_text(yaml.safe_dump(content))
    others = [argument for argument in command(root) if not argument.startswith(("--config", NETWORK[:40]))]
    line = refused(["fit", f"--config={root / 'stored.yaml'}", *others[1:]], root, capsys)
    assert "4 classes" in line
    assert str(stored) in line


@pytest.mark.parametrize(("more", "given"), [("--data.size=16", "3x16x16"), ("--data.channels=1", "1x8x8")])
def test_a_shape_the_network_cannot_take(more: str, given: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(command(root, more), root, capsys)
    assert f"samples of {given}" in line
    assert "takes 3x8x8" in line


def test_missing_captions(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in list((root / "pictures").rglob("*.png"))[:-1]:
        file.with_suffix(".txt").write_text("a picture")
    assert "1 of 30" in refused(command(root, "--data.captions=files"), root, capsys)


def test_verification_finds_damage_before_the_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = root / "pictures" / "class-2" / "0029.png"
    damage(file)
    assert str(file) in refused(command(root, "--data.verify=true"), root, capsys)


def test_damage_met_on_the_way_ends_the_run_by_its_name(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (root / "pictures").rglob("*.png"):
        damage(file)
    line = refused(command(root), root, capsys)
    assert "damaged picture" in line
    assert str(root / "pictures") in line


def test_damage_can_be_skipped_and_is_counted_and_listed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = root / "pictures" / "class-1" / "0010.png"
    damage(file)
    with caplog.at_level(logging.WARNING, "lightning_prune.data"):
        skip = ["--data.on_damage=skip", "--data.verify=true", "--trainer.max_steps=3"]
        assert main(command(root, *skip)) == 0
    assert (root / "runs" / "smoke-dense-dit" / "damaged.txt").read_text() == f"{file}\n"
    messages = [record.getMessage() for record in caplog.records]
    assert f"{file}: damaged, skipped (1 so far)" in messages
    assert any(message.startswith("1 damaged files were skipped") for message in messages)
