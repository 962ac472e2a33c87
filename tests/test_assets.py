"""The embedded default: complete, small, balanced, undamaged, and good for what it is used for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_prune.checksums import sha256
from lightning_prune.data import EmbeddedFashion
from lightning_prune.data.fashion import EMBEDDED_FILE
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.metrics.evaluation import Evaluator
from lightning_prune.metrics.extractors import load_extractor
from lightning_prune.metrics.macs import count_denoiser

ASSETS = Path(__file__).parents[1] / "lightning_prune" / "assets"
CHECKSUMS = json.loads((ASSETS / "checksums.json").read_text())


def test_every_binary_has_its_checksum() -> None:
    files = [p for p in ASSETS.rglob("*") if p.suffix in (".npz", ".safetensors")]
    assert {p.relative_to(ASSETS).as_posix(): sha256(p) for p in files} == CHECKSUMS


def test_data_is_small_balanced_and_needs_no_pickle() -> None:
    assert EMBEDDED_FILE.stat().st_size <= 15e6
    with np.load(EMBEDDED_FILE, allow_pickle=False) as arrays:
        counts = {name: np.bincount(arrays[name], minlength=10) for name in arrays if name.endswith("labels")}
    assert {name: set(count.tolist()) for name, count in counts.items()} == {
        "train_labels": {2000},
        "reference_labels": {800},
        "held_out_labels": {200},
    }


def test_no_held_out_image_is_in_another_split() -> None:
    data = EmbeddedFashion()
    rows = {split: {bytes(i.numpy().tobytes()) for i in data.split(split).images} for split in ("train", "held_out")}
    assert len(rows["train"] & rows["held_out"]) <= 1  # Fashion-MNIST itself holds a duplicate


def test_the_extractor_knows_clothes() -> None:
    data = EmbeddedFashion().split("held_out")
    logits = load_extractor("fashion_classifier").extract(data.images).logits
    assert logits is not None
    assert (logits.argmax(1) == data.labels).float().mean() > 0.91
    assert json.loads((ASSETS / "fashion_classifier" / "card.json").read_text())["test_accuracy"] >= 0.92


def test_the_floor_is_far_below_noise() -> None:
    evaluator = Evaluator(EmbeddedFashion())
    noise = torch.randint(0, 256, (500, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert 0 < evaluator.floor().value < 0.01 * evaluator.distance_of(noise).value


NETWORKS = {"fashion_dit": (DiT, 0.1e9), "fashion_unet": (UNet2D, 0.25e9)}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_are_within_their_limits(name: str) -> None:
    family, most_macs = NETWORKS[name]
    ledger = count_denoiser(family(weights=f"embedded:{name}"))
    assert 1e6 <= ledger.parameters <= 5e6
    assert ledger.macs() <= most_macs
    assert (ASSETS / name / "diffusion_pytorch_model.safetensors").stat().st_size <= 10e6


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_are_good_enough_for_pruning_to_mean_something(name: str) -> None:
    scores = json.loads((ASSETS / name / "scores.json").read_text())
    assert scores["fd_fashion"]["samples"] == 2000
    assert scores["accuracy"] >= 0.85
    assert scores["guided"]["accuracy"] >= 0.92
    assert scores["recall"] >= 0.5
    floor, dense, pruned = (scores[key]["value"] for key in ("floor", "fd_fashion", "one_shot_2to4"))
    assert dense - floor <= (pruned - floor) / 2


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("label", [0, 9, 10])
def test_labels_and_no_class_give_different_predictions(name: str, label: int) -> None:
    denoiser = NETWORKS[name][0](weights=f"embedded:{name}").eval()
    x, t = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([700])
    others = [denoiser(x, t, torch.tensor([c])) for c in range(11) if c != label]
    assert all((denoiser(x, t, torch.tensor([label])) - other).abs().max() > 1e-4 for other in others)
