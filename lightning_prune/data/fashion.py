"""Fashion-MNIST (Xiao et al. 2017, MIT licence): the part that ships with the package, and the whole."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_prune.data.arrays import ArrayData, LabelledImages, Split
from lightning_prune.protocols import InputError

CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
EMBEDDED_FILE = Path(__file__).parents[1] / "assets" / "fashion" / "images.npz"
REFERENCE_PER_CLASS = 800
_FILES = {
    "train": ("train-images-idx3-ubyte", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
    "train_labels": ("train-labels-idx1-ubyte", "9018921c3c673c538a1fc5bad174d6f9"),
    "test": ("t10k-images-idx3-ubyte", "8181f5470baa50b63fa0f6fddb340f0a"),
    "test_labels": ("t10k-labels-idx1-ubyte", "15d484375f8d13e6eb1aabb0c3f46965"),
}


def pad_to_32(images: Tensor) -> Tensor:
    """uint8 [N, 28, 28] to [N, 1, 32, 32], black border."""
    return pad(images, (2, 2, 2, 2))[:, None]


def balanced_order(labels: Tensor) -> Tensor:
    """Indices that take one sample of each class in turn, in file order within a class."""
    by_class = [torch.nonzero(labels == c).flatten() for c in range(len(CLASSES))]
    shortest = min(len(indices) for indices in by_class)
    return torch.stack([indices[:shortest] for indices in by_class], dim=1).flatten()


def read_idx(root: Path, part: str) -> Tensor:
    """Read one idx file, gzipped or not, checked by the md5 of its content."""
    stem, md5 = _FILES[part]
    for file in (root / f"{stem}.gz", root / stem, root / "FashionMNIST" / "raw" / stem):
        if file.exists():
            break
    else:
        raise InputError(f"data.root: {root} holds no {stem}(.gz); get it with torchvision or the Debian package")
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise InputError(f"{file}: checksum differs from the published one")
    dims = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=dims, offset=4).tolist()
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dims).copy()).view(shape)


class FashionMNIST(ArrayData):
    """All of Fashion-MNIST: 60,000 training images; the 10,000 test images are reference and held-out part.

    Args:
        root: folder with the four idx files, gzipped or not (torchvision's layout is found too).
        batch_size: samples per process and batch.
        seed: seed of the order; null takes that of `seed_everything`.
        workers: worker threads of the loader.
        validation_samples: held-out images that one validation pass reads.
    """

    num_classes = len(CLASSES)
    name = "fashion"

    def __init__(
        self,
        root: str = "/usr/share/datasets/fashion-mnist",
        batch_size: int = 64,
        seed: int | None = None,
        workers: int = 0,
        validation_samples: int = 512,
    ) -> None:
        super().__init__(batch_size, seed, workers, validation_samples)
        self.root = root

    def read(self, split: Split) -> LabelledImages:
        part = "train" if split == "train" else "test"
        images, labels = read_idx(Path(self.root), part), read_idx(Path(self.root), f"{part}_labels").long()
        if split != "train":
            order = balanced_order(labels)
            cut = REFERENCE_PER_CLASS * len(CLASSES)
            order = order[:cut] if split == "reference" else order[cut:]
            images, labels = images[order], labels[order]
        return LabelledImages(pad_to_32(images), labels)


class EmbeddedFashion(ArrayData):
    """The class-balanced part of Fashion-MNIST that ships with the package; needs no download and no account."""

    num_classes = len(CLASSES)
    name = "fashion"

    def read(self, split: Split) -> LabelledImages:
        try:
            with EMBEDDED_FILE.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{EMBEDDED_FILE}: missing or damaged data asset") from error
        return LabelledImages(pad_to_32(torch.from_numpy(images)), torch.from_numpy(labels).long())
