"""LPIPS against its definition, on a random AlexNet."""

import inspect
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from torchvision.models import alexnet

from lightning_prune.metrics.drift import drift
from lightning_prune.metrics.lpips import Lpips
from lightning_prune.protocols import InputError

TAPS = (1, 4, 7, 9, 11)  # the five activations that Zhang et al. compare
SHIFT, SCALE = ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    features = {k: v for k, v in alexnet(weights=None).state_dict().items() if k.startswith("features.")}
    file = tmp_path_factory.mktemp("alexnet") / "alexnet.safetensors"
    save_file(features, file)
    return file


def images(seed: int) -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def by_definition(weights: Path, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:

    network = alexnet(weights=None).features.eval()
    network.load_state_dict({k.removeprefix("features."): v for k, v in load_file(weights).items()})
    file = Path(inspect.getfile(torchmetrics_lpips)).parent / "lpips_models" / "alex.pth"
    linear = torch.load(file, map_location="cpu", weights_only=True)
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (SHIFT, SCALE))
    x, y, total = (a - shift) / scale, (b - shift) / scale, torch.zeros(len(a))
    for index, layer in enumerate(network):
        x, y = layer(x), layer(y)
        if index in TAPS:
            unit = [f / f.square().sum(1, keepdim=True).add(1e-8).sqrt() for f in (x, y)]
            weight = linear[f"lin{TAPS.index(index)}.model.1.weight"].view(1, -1, 1, 1)
            total += (weight * (unit[0] - unit[1]).square()).sum(1).mean((1, 2)).detach()
    return total


def test_agrees_with_the_definition(weights: Path) -> None:
    found = Lpips(weights)(images(0), images(1))
    torch.testing.assert_close(found, by_definition(weights, images(0), images(1)), rtol=1e-4, atol=1e-6)


def test_equal_images_are_at_zero_and_drift_reports_it(weights: Path) -> None:
    grey = images(0)[:, :1]
    found = drift(grey, grey, Lpips(weights))
    assert found.summary()["lpips"]["value"] == pytest.approx(0, abs=1e-7)
    assert "lpips" not in drift(grey, grey).summary()


def test_other_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for name in ("other.safetensors", "broken.pth", "missing.safetensors"):
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            Lpips(tmp_path / name)
