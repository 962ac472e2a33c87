"""Data sets of the Hugging Face `datasets` library, on disk or streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightning_prune.data.picture_data import PictureData
from lightning_prune.data.pictures import DecodedImages, Pictures
from lightning_prune.data.samples import Split
from lightning_prune.protocols import InputError
from lightning_prune.seeds import derive

Record = Mapping[str, Any]
_WINDOWS_KEPT = 3


@dataclass(frozen=True)
class Columns:
    """Where a record keeps what; None for what is not there or not wanted."""

    image: str
    label: str | None
    caption: str | None

    def picture(self, record: Record) -> Image.Image:
        """The picture of a record whose image column is not decoded."""
        stored = record[self.image]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise ValueError("no picture")
        return Image.open(BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])

    def text(self, record: Record, name: str) -> str | None:
        """The caption of a record. Raises `InputError` if it has none."""
        if self.caption is None:
            return None
        if not record[self.caption]:
            raise InputError(f"{name}: no caption in column {self.caption}")
        return str(record[self.caption])

    def number(self, record: Record, name: str) -> int:
        """The class of a record; 0 where there are none. Raises `InputError` for a record without class."""
        if self.label is None:
            return 0
        if record[self.label] is None or record[self.label] < 0:
            raise InputError(f"{name}: no class in column {self.label}")
        return int(record[self.label])


class TablePictures(Pictures):
    """Pictures of a data set on disk, in the order of its rows."""

    def __init__(self, dataset: Any, columns: Columns, classes: Sequence[str], title: str) -> None:
        self.dataset, self.columns, self.classes, self.title = dataset, columns, classes, title
        wanted = [column for column in (columns.label, columns.caption) if column is not None]
        rows = dataset.select_columns(wanted)[:] if wanted else {}
        names = [self.name(index) for index in range(len(dataset))]
        if columns.label is None:
            self.labels = torch.zeros(len(dataset), dtype=torch.long)
        else:
            found = zip(rows[columns.label], names, strict=True)
            self.labels = torch.tensor([columns.number({columns.label: label}, name) for label, name in found])
        if columns.caption is not None:
            found = zip(rows[columns.caption], names, strict=True)
            self.captions = [columns.text({columns.caption: text}, name) or "" for text, name in found]

    def name(self, index: int) -> str:
        return f"{self.title}, row {index}"

    def open(self, index: int) -> Image.Image:
        return self.columns.picture(self.dataset[index])


class Stream:
    """Records of a stream by their position, read in windows of which the last few are kept.

    Positions that rise, as those of a loader do, read the stream once. Going back starts it anew.

    Args:
        start: gives the records from a position on.
        length: number of records.
        window: records read at once.
        name: what messages call it.
    """

    def __init__(self, start: Callable[[int], Iterator[Record]], length: int, window: int, name: str) -> None:
        self.start, self.length, self.window, self.name = start, length, window, name
        self._lock = Lock()
        self._kept: dict[int, list[Record]] = {}
        self._coming: Iterator[Record] | None = None
        self._next = 0  # window that `_coming` continues with

    def record(self, position: int) -> Record:
        """One record. Raises `InputError` if the stream ends before it."""
        number, offset = divmod(position, self.window)
        with self._lock:
            if number not in self._kept:
                self._kept[number] = self._read(number)
                for old in sorted(self._kept, key=lambda n: abs(n - number))[_WINDOWS_KEPT:]:
                    del self._kept[old]
            return self._kept[number][offset]

    def _read(self, number: int) -> list[Record]:
        if self._coming is None or self._next != number:
            self._coming = self.start(number * self.window)
        wanted = min(self.window, self.length - number * self.window)
        records = [record for _, record in zip(range(wanted), self._coming, strict=False)]
        if len(records) < wanted:
            ended = number * self.window + len(records)
            raise InputError(f"data.samples: {self.name} ends after {ended} records, {self.length} were expected")
        self._next = number + 1
        return records


@dataclass
class StreamPictures(Pictures):
    """Pictures of a stream. Only what is asked for is decoded."""

    stream: Stream
    columns: Columns
    classes: Sequence[str] = ()

    def __len__(self) -> int:
        return self.stream.length

    def name(self, index: int) -> str:
        return f"{self.stream.name}, record {index}"

    def open(self, index: int) -> Image.Image:
        return self.columns.picture(self.stream.record(index))

    def label(self, index: int) -> int:
        return self.columns.number(self.stream.record(index), self.name(index))

    def caption(self, index: int) -> str | None:
        return self.columns.text(self.stream.record(index), self.name(index))


@dataclass
class StreamedImages(DecodedImages):
    """A stretch of a stream, shuffled inside windows, so that it is read from front to back."""

    window: int = 1

    def order(self, seed: int, epoch: int) -> Tensor:
        return window_order(len(self), self.window, seed, epoch)

    def stand_in(self, index: int, step: int) -> int:
        first = index // self.window * self.window
        return first + (index - first + step) % min(self.window, len(self) - first)


def window_order(size: int, window: int, seed: int, epoch: int) -> Tensor:
    """Positions [size] in windows of `window`, each in an order drawn from (seed, epoch, number of the window)."""
    parts = []
    for number, first in enumerate(range(0, size, window)):
        generator = torch.Generator().manual_seed(derive(seed, epoch, number))
        parts.append(first + torch.randperm(min(window, size - first), generator=generator))
    return torch.cat(parts)


class HuggingFaceData(PictureData):
    """A data set of the `datasets` library: a name on the hub, a folder of files, or what `save_to_disk` wrote.

    A streamed set is read from front to back and shuffled inside windows of `window` records. Every rank reads all
    records and decodes its own, so order and resuming do not depend on the number of ranks.

    Args:
        path: name on the hub, a folder, or a format ("parquet", "imagefolder") with `options: {data_files: ...}`.
        size: height and width that pictures are brought to.
        config: configuration of the data set, where it has several.
        split: training split; without streaming, slices such as "train[:90%]" work too.
        evaluation_split: split that training does not see; null keeps a share of the training split (of a stream, its
            beginning).
        image_column: column of the pictures; null takes the first that holds pictures.
        label_column: column of the classes; null takes the first that holds class numbers, "none" takes none.
        caption_column: column of the captions; null for none.
        streaming: read without downloading or converting first.
        samples: records of a streamed training split, where the data set does not say.
        evaluation_samples: records of a streamed evaluation split that are used.
        window: records of a stream that are shuffled together and held in memory, not decoded.
        options: further arguments of `datasets.load_dataset`.
    """

    def __init__(
        self,
        path: str,
        size: int,
        config: str | None = None,
        split: str = "train",
        evaluation_split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        caption_column: str | None = None,
        streaming: bool = False,
        samples: int | None = None,
        evaluation_samples: int | None = None,
        window: int = 2000,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(size=size, **kwargs)
        if streaming and self.worker_kind == "processes":
            raise InputError("data.worker_kind: a stream is read by threads; every process would read all of it")
        if window < 1:
            raise InputError(f"data.window: {window} is not positive")
        self.path, self.config, self.options = path, config, options or {}
        self.train_split, self.evaluation_split = split, evaluation_split
        self.image_column, self.label_column, self.caption_column = image_column, label_column, caption_column
        self.streaming, self.window = streaming, window
        self.samples, self.evaluation_samples = samples, evaluation_samples
        self.name = path

    def find(self) -> tuple[Pictures, Pictures | None]:
        train = self._pictures(self.train_split, self.samples)
        if self.evaluation_split is None:
            return train, None
        return train, self._pictures(self.evaluation_split, self.evaluation_samples)

    def read(self, split: Split) -> DecodedImages:
        if not self.streaming:
            return super().read(split)
        train, evaluation = self.found
        if evaluation is not None:
            first = 0
        elif not 0 < (first := round(self.kept * len(train))) < len(train):
            raise InputError(f"data.kept: {self.kept} of {len(train)} records leaves a split empty")
        if split == "train" or (split == "reference" and self.reference_from == "train"):
            return self._stretch(train, first, len(train))
        kept = train if evaluation is None else evaluation
        end = first if evaluation is None else len(evaluation)
        cut = round(0.8 * end) if self.reference_from == "evaluation" else 0
        return self._stretch(kept, 0, cut) if split == "reference" else self._stretch(kept, cut, end)

    def _stretch(self, pictures: Pictures, first: int, end: int) -> StreamedImages:
        positions = torch.arange(first, end)
        return StreamedImages(pictures, positions, self.transform, self.on_damage, window=self.window)

    def _pictures(self, split: str, samples: int | None) -> Pictures:
        dataset, title = self._opened(split), f"{self.path} {split}"
        columns, classes = self._columns(dataset, title)
        dataset = dataset.cast_column(columns.image, _undecoded())
        if not self.streaming:
            return TablePictures(dataset, columns, classes, title)
        length = samples or _stated(dataset, split)
        if length is None:
            raise InputError(f"data.samples: {title} does not say how many records it has; give their number")

        def start(position: int) -> Iterator[Record]:
            return iter(dataset.skip(position))

        return StreamPictures(Stream(start, length, self.window, title), columns, classes)

    def _opened(self, split: str) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise InputError("data: Hugging Face data sets need `pip install 'lightning_prune[datasets]'`") from error
        try:
            if {"state.json", "dataset_dict.json"} & {file.name for file in _listed(Path(self.path))}:
                return self._from_disk(datasets, split)
            return datasets.load_dataset(self.path, self.config, split=split, streaming=self.streaming, **self.options)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"data.path: {self.path}: {' '.join(str(error).split())[:200]}") from error

    def _from_disk(self, datasets: Any, split: str) -> Any:
        stored = datasets.load_from_disk(self.path)
        if isinstance(stored, datasets.DatasetDict):
            if split not in stored:
                raise InputError(f"data.split: {self.path} has no {split}, but {', '.join(stored)}")
            stored = stored[split]
        return stored.to_iterable_dataset() if self.streaming else stored

    def _columns(self, dataset: Any, title: str) -> tuple[Columns, list[str]]:
        import datasets

        features = dataset.features
        if features is None:
            raise InputError(f"data.path: {title} does not say which columns it has")
        pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        image = self.image_column or (pictures[0] if pictures else None)
        label = None if self.label_column == "none" else self.label_column or (classes[0] if classes else None)
        if image is None:
            raise InputError(f"data.image_column: {title} has no column of pictures, but {', '.join(features)}")
        named = {"image_column": image, "label_column": label, "caption_column": self.caption_column}
        for key, column in named.items():
            if column is not None and column not in features:
                raise InputError(f"data.{key}: {title} has no {column}, but {', '.join(features)}")
        if label is None:
            return Columns(image, None, self.caption_column), []
        if label not in classes:
            raise InputError(f"data.label_column: {label} of {title} does not hold class numbers (ClassLabel)")
        return Columns(image, label, self.caption_column), list(features[label].names)


def _undecoded() -> Any:
    import datasets

    return datasets.Image(decode=False)


def _stated(dataset: Any, split: str) -> int | None:
    """How many records a streamed split has, where its description says."""
    splits = getattr(dataset.info, "splits", None) or {}
    stated = splits.get(split)
    return int(stated.num_examples) if stated is not None and stated.num_examples else None


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
