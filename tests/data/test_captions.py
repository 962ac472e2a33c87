"""Captions: in files beside the pictures, in tables, missing."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.data import ImageFolder
from lightning_prune.protocols import InputError
from tests.data.pictures import write_pictures


def captioned(root: Path, source: str, **arguments: Any) -> ImageFolder:
    return ImageFolder(str(root), size=8, batch_size=4, seed=0, kept=0.25, captions=source, **arguments)


def caption_of(file: Path) -> str:
    return f"a picture, number {int(file.stem)}"


def write_captions(
    root: Path, files: list[Path], source: str, column: str = "caption", image: str = "file_name"
) -> None:
    rows = [{image: str(file.relative_to(root)), column: caption_of(file), "other": 1} for file in files]
    if source == "files":
        for file in files:
            file.with_suffix(".txt").write_text(caption_of(file) + "\n")
    elif source.endswith((".csv", ".tsv")):
        with (root / source).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [image, column, "other"], delimiter="," if source.endswith("csv") else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif source.endswith(".jsonl"):
        (root / source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), root / source)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("source", ["files", "captions.csv", "captions.tsv", "captions.jsonl", "captions.parquet"])
def test_every_picture_comes_with_its_caption(source: str, classes: int, tmp_path: Path) -> None:
    write_captions(tmp_path, write_pictures(tmp_path, classes=classes), source)
    data = captioned(tmp_path, source)
    train = data.read("train")
    for batch in data.train_dataloader():
        for position, caption in zip(batch["id"], batch["caption"], strict=True):
            assert caption == caption_of(Path(data.found[0].name(int(train.positions[position]))))


def test_columns_can_be_named(tmp_path: Path) -> None:
    write_captions(tmp_path, write_pictures(tmp_path), "t.csv", column="text", image="path")
    data = captioned(tmp_path, "t.csv", caption_column="text", image_column="path")
    assert len(set(data.prompts(10)["caption"])) == 10
    with pytest.raises(InputError, match=r"t\.csv: no column 'caption'"):
        _ = captioned(tmp_path, "t.csv", image_column="path").found


@pytest.mark.parametrize("source", ["files", "captions.csv", "captions.jsonl"])
def test_missing_captions_name_a_picture_and_their_number(source: str, tmp_path: Path) -> None:
    files = write_pictures(tmp_path)
    write_captions(tmp_path, files[:-2], source)
    with pytest.raises(InputError) as refused:
        _ = captioned(tmp_path, source).found
    assert str(files[-2]) in str(refused.value)
    assert "2 of 24" in str(refused.value)


def test_an_empty_caption_is_a_missing_one(tmp_path: Path) -> None:
    files = write_pictures(tmp_path)
    write_captions(tmp_path, files, "files")
    files[5].with_suffix(".txt").write_text("  \n")
    with pytest.raises(InputError, match=r"0005\.png: no caption"):
        _ = captioned(tmp_path, "files").found


@pytest.mark.parametrize(("source", "content"), [("t.csv", b"\xff\xfe\x00"), ("t.jsonl", b"{"), ("t.parquet", b"PAR1")])
def test_a_damaged_table(source: str, content: bytes, tmp_path: Path) -> None:
    write_pictures(tmp_path)
    if source.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / source).write_bytes(content)
    with pytest.raises(InputError, match=source):
        _ = captioned(tmp_path, source).found


def test_prompts_are_the_same_for_a_seed_and_repeat_only_when_the_set_is_used_up(tmp_path: Path) -> None:
    write_captions(tmp_path, write_pictures(tmp_path), "files")
    data = captioned(tmp_path, "files")
    assert data.prompts(8, seed=1)["caption"] == data.prompts(8, seed=1)["caption"]
    assert data.prompts(8, seed=1)["caption"] != data.prompts(8, seed=2)["caption"]
    many = data.prompts(30)["id"].tolist()
    assert len(many) == 30
    assert len(set(many[:18])) == 18
