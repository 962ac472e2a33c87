"""Every config parses; every smoke config fits and validates through the real command line."""

from pathlib import Path

import pytest

from lightning_prune.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
ALL = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in ("sweeps", "strategies"))
SMOKE = sorted((CONFIGS / "smoke").glob("*.yaml"))


# What is printed is read again for one config of every folder; reading takes seconds.
FIRST = {min(folder.glob("*.yaml")) for folder in {config.parent for config in ALL}}


@pytest.mark.parametrize("config", ALL, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_parses_and_prints_a_reusable_config(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = _printed(config, capsys)
    if config in FIRST:
        (again := tmp_path / "again.yaml").write_text(printed)
        assert _printed(again, capsys) == printed


def _printed(config: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("config", SMOKE, ids=lambda p: p.stem)
def test_smoke_config_fits_and_validates(config: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "extractor: inception" in config.read_text():
        request.getfixturevalue("prefetched")
    common = ["--config", str(config), "--run.root", str(tmp_path), "--run.name", "run"]
    assert main(["fit", *common]) == 0
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "report.json", "metrics.csv", "checkpoints", "artifact"}
    assert main(["validate", *common, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0


def test_there_are_smoke_configs() -> None:
    assert len(SMOKE) >= 3
