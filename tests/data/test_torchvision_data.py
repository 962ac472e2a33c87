"""Sets of torchvision, by files made on the spot: one class with `train`, one with `split`, one with neither."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_prune.data import TorchvisionData
from lightning_prune.data.torchvision_data import labels_of
from lightning_prune.pixels import to_uint8
from lightning_prune.protocols import InputError
from tests.data.pictures import write_pictures


def write_idx(root: Path, counts: dict[str, int]) -> dict[str, np.ndarray[Any, Any]]:
    """Raw files as torchvision's MNIST wants them; returns the images by part."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator, written = np.random.default_rng(0), {}
    for part, count in counts.items():
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">4i", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
        written[part] = images
    return written


def mnist(root: Path, **arguments: Any) -> TorchvisionData:
    return TorchvisionData("MNIST", str(root), **{"size": 28, "channels": 1, "batch_size": 5, "seed": 0, **arguments})


def test_a_class_with_a_train_argument(tmp_path: Path) -> None:
    written = write_idx(tmp_path, {"train": 40, "t10k": 20})
    data = mnist(tmp_path)
    assert data.num_classes == 10
    assert (len(data.split("train")), len(data.split("held_out"))) == (40, 20)
    for sample in [data.split("train")[index] for index in (0, 7, 39)]:
        index = int(sample["id"])
        assert torch.equal(to_uint8(sample["x"])[0], torch.from_numpy(written["train"][index]))
        assert int(sample["cond"]) == index % 10


def test_a_part_of_the_test_set_can_be_the_reference(tmp_path: Path) -> None:
    write_idx(tmp_path, {"train": 40, "t10k": 20})
    data = mnist(tmp_path, reference="evaluation")
    assert sorted(torch.bincount(data.read("reference").labels).tolist()) == [1] * 4 + [2] * 6
    assert len(data.split("held_out")) == 4


def test_a_class_with_a_split_argument(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("test", 6)):
        write_pictures(tmp_path / "rendered-sst2" / split, count, classes=0)
        for index, file in enumerate(sorted((tmp_path / "rendered-sst2" / split).glob("*.png"))):
            folder = file.parent / ("positive" if index % 2 else "negative")
            folder.mkdir(exist_ok=True)
            file.rename(folder / file.name)
    data = TorchvisionData("RenderedSST2", str(tmp_path), size=8, batch_size=5)
    assert (len(data.split("train")), len(data.split("held_out")), data.num_classes) == (20, 6, 2)


def test_a_class_with_neither_keeps_a_share(tmp_path: Path) -> None:
    write_pictures(tmp_path, count=20, classes=2)
    data = TorchvisionData("ImageFolder", str(tmp_path), size=8, kept=0.2)
    assert (len(data.split("train")), len(data.split("held_out"))) == (16, 4)


def test_targets_are_classes_where_they_are_numbers() -> None:
    class Kept(list[Any]):
        targets = torch.tensor([3, 1])

    assert labels_of(Kept([(None, 3), (None, 1)])) == [3, 1], "from where the class keeps them"
    assert labels_of([(None, 2), (None, 0)]) == [2, 0], "or from the samples"
    assert labels_of([(None, torch.ones(40))]) is None


@pytest.mark.parametrize(
    ("dataset", "arguments", "named"),
    [
        ("NoSuchSet", {}, "NoSuchSet is no data set"),
        ("transforms", {}, "transforms is no data set"),
        ("MNIST", {}, "Dataset not found"),
        ("RenderedSST2", {"evaluation_split": "dev"}, "RenderedSST2 says"),
        ("MNIST", {"options": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_the_line_names_what_is_wrong(dataset: str, arguments: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        TorchvisionData(dataset, str(tmp_path), size=28, **arguments).train_dataloader()
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
