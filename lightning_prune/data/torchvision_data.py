"""Data sets of torchvision, by the name of their class."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor

from lightning_prune.data.picture_data import PictureData
from lightning_prune.data.pictures import Pictures
from lightning_prune.protocols import InputError

_LABELS = ("targets", "labels", "_labels", "y")  # where the classes keep them


@dataclass
class TorchvisionPictures(Pictures):
    """Pictures of a torchvision data set that was made without transforms."""

    dataset: Any
    title: str
    labels: Tensor
    classes: Sequence[str] = ()

    def name(self, index: int) -> str:
        return f"{self.title}, picture {index}"

    def open(self, index: int) -> Image.Image:
        picture: Image.Image = self.dataset[index][0]
        return picture


def labels_of(dataset: Any) -> list[int] | None:
    """The class numbers of a data set whose targets are whole numbers, else None.

    They are read from the attributes in which torchvision's classes keep them, so nothing is decoded; only a class
    that keeps them elsewhere is read once, from end to end.
    """
    if not isinstance(dataset[0][1], int):
        return None
    for name in _LABELS:
        kept = getattr(dataset, name, None)
        if kept is not None and len(kept) == len(dataset):
            return [int(label) for label in kept]
    samples = getattr(dataset, "samples", getattr(dataset, "_samples", None))
    if samples is not None and len(samples) == len(dataset):
        return [int(label) for _, label in samples]
    return [int(dataset[index][1]) for index in range(len(dataset))]


class TorchvisionData(PictureData):
    """A data set of torchvision with its own training and evaluation part.

    Targets that are whole numbers are classes; others (the attributes of CelebA) are left out.

    Args:
        dataset: name of a class in torchvision.datasets, for example CIFAR10 or CelebA.
        root: folder of the data, as that class wants it.
        size: height and width that pictures are brought to.
        evaluation_split: value of the class's `split` for evaluation pictures, where it has such an argument ("valid",
            "val"); classes with a `train` argument need none.
        download: let the class download what is missing.
        options: further arguments of the class.
    """

    def __init__(
        self,
        dataset: str,
        root: str,
        size: int,
        evaluation_split: str = "test",
        download: bool = False,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(size=size, **kwargs)
        self.dataset, self.root, self.evaluation_split = dataset, root, evaluation_split
        self.download, self.options = download, options or {}
        self.name = f"torchvision {dataset}"

    def find(self) -> tuple[TorchvisionPictures, TorchvisionPictures | None]:
        cls = getattr(torchvision.datasets, self.dataset, None)
        if not (inspect.isclass(cls) and issubclass(cls, torchvision.datasets.VisionDataset)):
            raise InputError(f"data.dataset: {self.dataset} is no data set of torchvision")
        known = inspect.signature(cls).parameters
        if "train" in known:
            return self._pictures(cls, {"train": True}), self._pictures(cls, {"train": False})
        if "split" in known:
            evaluation = {"split": self.evaluation_split}
            return self._pictures(cls, {"split": "train"}), self._pictures(cls, evaluation)
        return self._pictures(cls, {}), None

    def _pictures(self, cls: Any, part: dict[str, Any]) -> TorchvisionPictures:
        download = {"download": True} if self.download else {}
        try:
            dataset = cls(self.root, **part, **download, **self.options)
            labels = labels_of(dataset)
        except (RuntimeError, OSError, ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"data.root: {self.root}: torchvision's {self.dataset} says: {reason}") from error
        title = " ".join([self.name, *(f"{key}={value}" for key, value in part.items())])
        if labels is None:
            return TorchvisionPictures(dataset, title, torch.zeros(len(dataset), dtype=torch.long))
        names = getattr(dataset, "classes", None) or [str(number) for number in range(max(labels) + 1)]
        return TorchvisionPictures(dataset, title, torch.tensor(labels), [str(name) for name in names])
