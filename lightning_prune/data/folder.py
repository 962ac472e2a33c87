"""Folders of pictures, with or without class folders, with or without captions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_prune.data.captions import read_captions
from lightning_prune.data.picture_data import PictureData
from lightning_prune.data.pictures import FilePictures
from lightning_prune.protocols import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
Labels = Literal["auto", "folders", "none"]


def find_files(root: Path, key: str = "data.root") -> list[Path]:
    """Every picture below `root`, by file name and then by folder, so that sorting into classes moves none.

    Raises:
        InputError: no such folder, or no picture in it.
    """
    if not root.is_dir():
        raise InputError(f"{key}: {root}: no such folder")
    below = (Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names)
    files = [file for file in below if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    if not files:
        raise InputError(f"{key}: {root} holds no picture ({', '.join(sorted(SUFFIXES))})")
    return sorted(files, key=lambda file: (file.name, file.parent.as_posix()))


def class_names(root: Path, files: Sequence[Path], labels: Labels) -> list[str]:
    """Folders directly below `root` that pictures are in, sorted; none where labels are not wanted or not there.

    Raises:
        InputError: class folders are wanted, and pictures lie beside them.
    """
    if labels == "none":
        return []
    beside = [file for file in files if file.parent == root]
    if len(beside) == len(files) and labels == "auto":
        return []
    if beside:
        raise InputError(
            f"{beside[0]}: lies beside the class folders of {root}; set data.labels to none to ignore them"
        )
    return sorted({file.relative_to(root).parts[0] for file in files})


class ImageFolder(PictureData):
    """A folder of pictures; folders directly below `root` are classes, numbered in the order of their names.

    Args:
        root: folder with the pictures.
        size: height and width that pictures are brought to.
        evaluation_root: folder with pictures that training does not see; null keeps a share of those in `root`.
        labels: "folders" wants class folders, "none" ignores folders, "auto" takes class folders where there are some.
        classes: names of all class folders in the order of their numbers, where that is not the sorted one or where
            some of them are not there.
        captions: "files" for a text file beside each picture, or the name of a .csv, .tsv, .jsonl or .parquet file in
            the folder; null for none.
        caption_column: column of the captions in that file.
        image_column: column of the picture's path, relative to the folder.
    """

    def __init__(
        self,
        root: str,
        size: int,
        evaluation_root: str | None = None,
        labels: Labels = "auto",
        classes: list[str] | None = None,
        captions: str | None = None,
        caption_column: str = "caption",
        image_column: str = "file_name",
        **kwargs: Any,
    ) -> None:
        super().__init__(size=size, **kwargs)
        self.root, self.evaluation_root = root, evaluation_root
        self.labels: Labels = labels
        self.classes = classes
        self.captions, self.caption_column, self.image_column = captions, caption_column, image_column
        self.name = root

    def find(self) -> tuple[FilePictures, FilePictures | None]:
        if self.evaluation_root is None:
            return self._pictures(Path(self.root), "data.root"), None
        train, evaluation = Path(self.root).resolve(), Path(self.evaluation_root).resolve()
        if train == evaluation or train in evaluation.parents or evaluation in train.parents:
            raise InputError(f"data.evaluation_root: {evaluation} and {train} share pictures")
        return (
            self._pictures(Path(self.root), "data.root"),
            self._pictures(Path(self.evaluation_root), "data.evaluation_root"),
        )

    def _pictures(self, root: Path, key: str) -> FilePictures:
        files = find_files(root, key)
        found = class_names(root, files, self.labels)
        classes = found if self.classes is None else self.classes
        if unknown := sorted({*found} - {*classes}):
            raise InputError(f"{root / unknown[0]}: not one of data.classes")
        number = {name: index for index, name in enumerate(classes)}
        labels = [number[file.relative_to(root).parts[0]] if found else 0 for file in files]
        captions = None
        if self.captions is not None:
            captions = read_captions(root, files, self.captions, self.caption_column, self.image_column)
        return FilePictures(files, torch.tensor(labels), classes if found else (), captions)
