"""The worked example of docs/own-model.md, as it stands there: planned, fitted, loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lightning_prune
from lightning_prune.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "own-model.md").read_text()


def shown(name: str) -> str:
    """The block of the page that follows the name of a file."""
    found = re.search(rf"`{re.escape(name)}`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("my_model.py", "my_model.yaml"):
        (tmp_path / name).write_text(shown(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_model", raising=False)
    return tmp_path


def test_the_worked_example(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "my_model.yaml"]) == 0
    assert "3 of 6 layers" in capsys.readouterr().out
    assert main(["fit", "--config", "my_model.yaml"]) == 0
    denoiser = lightning_prune.load("runs/my-model/artifact")
    assert type(denoiser).__name__ == "MyModel"
    x, t, cond = torch.randn(2, 1, 32, 32), torch.tensor([1, 900]), torch.tensor([3, 10])
    assert denoiser(x, t, cond).shape == x.shape
    weight = denoiser.network.get_parameter("body.0.weight")
    assert ((weight.unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all()
    assert (denoiser.network.get_parameter("first.weight") != 0).all()


def test_it_starts_from_weights_of_ones_own(folder: Path) -> None:
    from my_model import MyModel, Network  # type: ignore[import-not-found]

    network = Network(channels=8)
    save_file(network.state_dict(), folder / "mine.safetensors")
    denoiser = MyModel(weights="mine.safetensors", config={"channels": 8})
    assert torch.equal(denoiser.network.last.weight, network.last.weight)
