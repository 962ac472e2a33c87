"""Sets of the `datasets` library, on disk and streamed, written on the spot."""

import sys
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_prune.data import HuggingFaceData
from lightning_prune.data.hugging_face import Stream, window_order
from lightning_prune.pixels import to_uint8
from lightning_prune.protocols import InputError


def test_a_window_order_reads_from_front_to_back() -> None:
    order = window_order(25, 10, seed=1, epoch=2)
    assert [sorted(part.tolist()) for part in order.split(10)] == [[*range(10)], [*range(10, 20)], [*range(20, 25)]]
    assert not torch.equal(order, torch.arange(25))
    assert torch.equal(order, window_order(25, 10, seed=1, epoch=2))
    assert not torch.equal(order, window_order(25, 10, seed=1, epoch=3))


def test_a_stream_is_read_once_for_rising_positions_and_again_for_falling_ones() -> None:
    starts: list[int] = []

    def start(position: int) -> Any:
        starts.append(position)
        return iter([{"n": n} for n in range(position, 50)])

    stream = Stream(start, 50, 5, "numbers")
    assert [stream.record(n)["n"] for n in (*range(20), 13, 20, 49)] == [*range(20), 13, 20, 49]
    assert starts == [0, 45], "the jump to the end starts anew, small steps back do not"
    assert stream.record(0)["n"] == 0
    with pytest.raises(InputError, match="numbers ends after 50 records, 60 were expected"):
        Stream(start, 60, 20, "numbers").record(41)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Sixty records with picture, class and caption, as `save_to_disk` writes them and as parquet files."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["a", "b", "c"]),
            "text": datasets.Value("string"),
        }
    )

    def rows(count: int) -> dict[str, Any]:
        generator = np.random.default_rng(count)
        pictures = []
        for _ in range(count):
            buffer = BytesIO()
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        texts = [f"caption {i}" for i in range(count)]
        return {"picture": pictures, "kind": [i % 3 for i in range(count)], "text": texts}

    parts = {part: datasets.Dataset.from_dict(rows(n), features=features) for part, n in (("train", 60), ("test", 9))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    for part, data in parts.items():
        for shard in range(2):
            data.shard(2, shard, contiguous=True).to_parquet(tmp_path / "parquet" / f"{part}-{shard}.parquet")
    return tmp_path


def hugging_face(path: Path, **arguments: Any) -> HuggingFaceData:
    return HuggingFaceData(str(path), **{"size": 8, "batch_size": 6, "seed": 0, "window": 20, **arguments})


@pytest.mark.parametrize("form", ["saved", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_form_gives_the_same_samples(form: str, streaming: bool, stored: Path) -> None:
    expected = hugging_face(stored / "saved", evaluation_split="test", caption_column="text")
    data = hugging_face(
        stored / form,
        evaluation_split="test",
        caption_column="text",
        streaming=streaming,
        samples=60,
        evaluation_samples=9,
    )
    assert data.num_classes == 3
    train, wanted = data.read("train"), expected.read("train")
    assert len(train) == 60
    for index in (0, 5, 59):
        assert torch.equal(train[index]["x"], wanted[index]["x"])
        assert (int(train[index]["cond"]), train[index]["caption"]) == (index % 3, f"caption {index}")
    held_out = [data.read("held_out")[index]["caption"] for index in range(9)]
    assert sorted(held_out) == [f"caption {index}" for index in range(9)]
    assert data.split("reference").images[:4].shape == (4, 3, 8, 8)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_share_is_kept_where_there_is_no_evaluation_split(streaming: bool, stored: Path) -> None:
    data = hugging_face(stored / "saved", streaming=streaming, samples=60, kept=0.2)
    train = {bytes(to_uint8(s["x"]).numpy().tobytes()) for s in map(data.split("train").__getitem__, range(48))}
    held_out = {bytes(to_uint8(s["x"]).numpy().tobytes()) for s in map(data.split("held_out").__getitem__, range(12))}
    assert (len(train), len(held_out), len(train & held_out)) == (48, 12, 0)


def ids(data: HuggingFaceData, count: int, consumed: int = 0) -> list[list[int]]:
    loader = data.train_dataloader()
    loader.load_state_dict({"consumed": consumed, "batch_size": 6, "world": 1})
    found: list[list[int]] = []
    while len(found) < count:
        found += [batch["id"].tolist() for batch in loader]
    return found[:count]


@pytest.mark.parametrize("workers", [0, 3])
def test_a_stream_resumes_where_it_stopped(workers: int, stored: Path) -> None:
    def data() -> HuggingFaceData:
        return hugging_face(stored / "saved", evaluation_split="test", streaming=True, samples=60, workers=workers,
                            evaluation_samples=9)  # fmt: skip

    whole = ids(data(), 20)
    assert sorted(chain.from_iterable(whole[:10])) == [*range(60)]
    assert ids(data(), 13, consumed=7) == whole[7:]


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_pictures(streaming: bool, stored: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.load_from_disk(stored / "saved")["train"].cast_column("picture", datasets.Image(decode=False))

    def cut(row: dict[str, Any], index: int) -> dict[str, Any]:
        content = row["picture"]["bytes"]
        return {"picture": {"bytes": content[:40] if index == 13 else content, "path": None}}

    damaged = data.map(cut, with_indices=True).cast_column("picture", datasets.Image())
    datasets.DatasetDict({"train": damaged, "test": damaged}).save_to_disk(stored / "damaged")
    arguments: dict[str, Any] = {"evaluation_split": "test", "samples": 60, "evaluation_samples": 60}
    with pytest.raises(InputError, match=r"damaged train, (row|record) 13: damaged picture"):
        ids(hugging_face(stored / "damaged", streaming=streaming, **arguments), 10)
    skipping = hugging_face(stored / "damaged", streaming=streaming, on_damage="skip", **arguments)
    assert len(ids(skipping, 10)) == 10
    assert len(skipping.damaged) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "dev"}, "dev"),
        ({"image_column": "text2"}, "data.image_column"),
        ({"label_column": "text"}, "data.label_column"),
        ({"caption_column": "words"}, "data.caption_column"),
        ({"streaming": True}, "data.samples"),
        ({"streaming": True, "samples": 61}, "ends after 60 records"),
        ({"streaming": True, "worker_kind": "processes"}, "data.worker_kind"),
        ({"window": 0}, "data.window"),
    ],
)
def test_the_line_names_what_is_wrong(arguments: dict[str, Any], named: str, stored: Path) -> None:
    with pytest.raises(InputError) as refused:
        ids(hugging_face(stored / "saved", **{"kept": 0.02, **arguments}), 10)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match=r"data\.path"):
        _ = hugging_face(tmp_path / "nothing").found


def test_without_the_library_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"lightning_prune\[datasets\]"):
        _ = HuggingFaceData("anything", size=8).found
