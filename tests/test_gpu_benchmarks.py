"""The GPU measurements: without a GPU they say so and end well; at toy size they run on a CPU to the end."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
SCRIPTS = sorted(file for file in FOLDER.glob("*.py") if file.stem not in ("measure", "networks"))


def run(script: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_without_a_gpu_it_says_so(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(script, monkeypatch) == 0
    assert capsys.readouterr().out.strip() == "skipped: no CUDA device"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_a_toy_runs_to_its_json(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, monkeypatch, "--toy", "--repeats", "2") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["cells"]
    assert all("failed" not in cell for cell in result["cells"])
    assert all(cell["arms"].keys() > {"dense"} for cell in result["cells"])
