"""Captions of pictures: a text file beside each, or a column of a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_prune.protocols import InputError

BESIDE = "files"


def read_captions(root: Path, files: Sequence[Path], source: str, column: str, image_column: str) -> list[str]:
    """The caption of every file.

    Args:
        root: folder of the pictures; tables name them relative to it.
        files: the pictures.
        source: "files" for `<picture>.txt`, or a .csv, .tsv, .jsonl or .parquet file, absolute or inside `root`.
        column: column of the caption.
        image_column: column of the picture's path.

    Raises:
        InputError: a table that is missing, cannot be read or lacks a column; a picture without caption.
    """
    if source == BESIDE:
        return _complete(files, {file: _beside(file) for file in files}, "<picture>.txt")
    table = root / source
    named = {root / name: caption for name, caption in read_table(table, image_column, column)}
    return _complete(files, named, str(table))


def _beside(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text}: cannot be read as text") from error


def _complete(files: Sequence[Path], captions: Mapping[Path, str | None], source: str) -> list[str]:
    missing = [file for file in files if not captions.get(file)]
    if missing:
        raise InputError(f"{missing[0]}: no caption in {source}; {len(missing)} of {len(files)} pictures have none")
    return [captions[file] or "" for file in files]


def read_table(table: Path, key: str, value: str) -> list[tuple[str, str]]:
    """Two columns of a table, as text; rows where either is missing are left out."""
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if table.suffix not in readers:
        raise InputError(f"data.captions: {table.name}: expected files, or a table ({', '.join(readers)})")
    if not table.is_file():
        raise InputError(f"data.captions: {table}: no such file")
    try:
        rows = readers[table.suffix](table, key, value)
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # UnicodeDecodeError, JSON and arrow's errors are ValueErrors
        raise InputError(f"{table}: cannot be read ({' '.join(str(error).split())[:100]})") from error
    except KeyError as error:
        raise InputError(f"{table}: no column {error}") from error
    return [(str(name), str(text).strip()) for name, text in rows if name is not None and text is not None]


def _csv(table: Path, key: str, value: str) -> list[tuple[str | None, str | None]]:
    with table.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if table.suffix == ".tsv" else ",")
        for column in (key, value):
            if column not in (reader.fieldnames or ()):
                raise KeyError(column)
        return [(row[key], row[value]) for row in reader]


def _jsonl(table: Path, key: str, value: str) -> list[tuple[str | None, str | None]]:
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
    for column in (key, value):
        if not any(column in row for row in rows):
            raise KeyError(column)
    return [(row.get(key), row.get(value)) for row in rows]


def _parquet(table: Path, key: str, value: str) -> list[tuple[str | None, str | None]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{table}: parquet needs pyarrow; pip install 'lightning_prune[datasets]'") from error
    present = parquet.read_schema(table).names
    for column in (key, value):
        if column not in present:
            raise KeyError(column)
    columns = parquet.read_table(table, columns=[key, value]).to_pydict()
    return list(zip(columns[key], columns[value], strict=True))
