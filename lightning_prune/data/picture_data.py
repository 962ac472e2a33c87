"""The base of data modules whose pictures are decoded when read: how they are split, checked and transformed."""

from __future__ import annotations

from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prune.data.augment import Crop, ImageTransform
from lightning_prune.data.base import DataModule
from lightning_prune.data.pictures import DecodedImages, OnDamage, Pictures, stratified
from lightning_prune.data.samples import Split
from lightning_prune.protocols import InputError

ReferenceFrom = Literal["train", "evaluation"]
_REFERENCE_SHARE = 0.8


class PictureData(DataModule):
    """Pictures that are decoded when read, resized and cropped to one shape.

    Evaluation pictures are a part that the data set brings along, or else a share kept from training. By the usual
    convention of FID the reference is the training set and all evaluation pictures are held out; with
    `reference="evaluation"` four fifths of them are the reference and the rest is held out.

    Args:
        size: height and width that pictures are brought to.
        channels: 3 for colour, 1 for grey.
        crop: what is kept of the longer side while training: "center" or "random".
        flip: mirror half of the pictures while training.
        cut: left, top, right and bottom of the only part of every picture that is looked at, in pixels; null for all.
        kept: share of the pictures kept from training where no evaluation part is given, in (0, 1).
        reference: where the pictures that distances compare with come from: "train" or "evaluation".
        on_damage: "stop" ends a run at a picture that cannot be decoded; "skip" lets another stand in, counts it, and
            lists it in `damaged.txt`.
        verify: decode every picture once before the run, so that a damaged one ends it before it begins.
        batch_size: samples per process and batch.
        seed: seed of order and augmentation; null takes that of `seed_everything`.
        workers: worker threads or processes of the loader; 0 reads between the steps.
        validation_samples: held-out images that one validation pass reads.
        worker_kind: "threads" or "processes".
    """

    def __init__(
        self,
        size: int,
        channels: int = 3,
        crop: Crop = "center",
        flip: bool = False,
        cut: tuple[int, int, int, int] | None = None,
        kept: float = 0.1,
        reference: ReferenceFrom = "train",
        on_damage: OnDamage = "stop",
        verify: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < kept < 1:
            raise InputError(f"data.kept: {kept} is not in (0, 1)")
        self.transform = ImageTransform(size, channels, crop, flip, cut)
        self.kept, self.reference_from, self.on_damage, self.verify = kept, reference, on_damage, verify
        self._found: tuple[Pictures, Pictures | None] | None = None

    @abstractmethod
    def find(self) -> tuple[Pictures, Pictures | None]:
        """The training pictures and the evaluation part, None where there is none. Nothing is decoded."""

    @property
    def found(self) -> tuple[Pictures, Pictures | None]:
        """What `find` gives, found once."""
        if self._found is None:
            train, evaluation = self.find()
            if evaluation is not None and list(train.classes) != list(evaluation.classes):
                odd = sorted({*train.classes} ^ {*evaluation.classes})
                raise InputError(f"data: classes of training and evaluation pictures differ: {', '.join(odd[:5])}")
            self._found = train, evaluation
        return self._found

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of classes; 0 where pictures have none."""
        return len(self.found[0].classes)

    def read(self, split: Split) -> DecodedImages:
        train, evaluation = self.found
        if evaluation is not None:
            kept = _stratified(evaluation)
            training = torch.arange(len(train))
        else:
            order = _stratified(train)
            count = round(self.kept * len(train))
            if not 0 < count < len(train):
                raise InputError(f"data.kept: {self.kept} of {len(train)} pictures leaves a split empty")
            kept, training = order[:count], order[count:].sort().values
        if split == "train":
            return self._decoded(train, training)
        evaluated = train if evaluation is None else evaluation
        if self.reference_from == "evaluation":
            cut = round(_REFERENCE_SHARE * len(kept))
            return self._decoded(evaluated, kept[:cut] if split == "reference" else kept[cut:])
        if split == "held_out":
            return self._decoded(evaluated, kept)
        mine = set(training.tolist())
        return self._decoded(train, torch.tensor([i for i in _stratified(train).tolist() if i in mine]))

    def _decoded(self, pictures: Pictures, positions: Tensor) -> DecodedImages:
        if not len(positions):
            raise InputError(f"data: {self.name} has too few pictures for its splits")
        return DecodedImages(pictures, positions, self.transform, self.on_damage)

    def prepare_data(self) -> None:
        """With `verify`, decode everything once; one process of each machine does."""
        if self.verify:
            for pictures in self.found:
                if pictures is not None:
                    self._verify(pictures)

    def _verify(self, pictures: Pictures) -> None:
        split = DecodedImages(pictures, torch.arange(len(pictures)), self.transform, self.on_damage)
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            found = pool.map(split.pixels, range(len(split)))
            try:
                self.skipped([pictures.name(index) for index, pixels in enumerate(found) if pixels is None])
            finally:
                pool.shutdown(cancel_futures=True)


def _stratified(pictures: Pictures) -> Tensor:
    return stratified(pictures.labels, [pictures.name(index).rpartition("/")[2] for index in range(len(pictures))])
