"""Every config parses; every smoke config fits and validates through the real command line."""

from pathlib import Path

import pytest

from lightning_prune.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
ALL = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in ("sweeps", "strategies"))
SMOKE = sorted((CONFIGS / "smoke").glob("*.yaml"))


@pytest.mark.parametrize("config", ALL, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_parses_and_prints_a_reusable_config(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(again), "--print_config"])
    assert capsys.readouterr().out == printed


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
