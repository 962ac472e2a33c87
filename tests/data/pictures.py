"""Small folders of pictures, and fits that record their losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from PIL import Image

from tests.factories import fit


def write_pictures(root: Path, count: int = 24, classes: int = 3, size: tuple[int, int] = (12, 10)) -> list[Path]:
    """Random PNG files `root/class-<k>/<index>.png`, colour; without class folders where there are no classes."""
    generator = np.random.default_rng(0)
    files = []
    for index in range(count):
        folder = root / f"class-{index % classes}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")
        files.append(folder / f"{index:04d}.png")
    return files


def damage(file: Path) -> None:
    """Cut a picture in half: its header is read, its pixels are not."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def losses(module: pl.LightningModule, data: pl.LightningDataModule, folder: Path, steps: int = 4) -> list[float]:
    """The loss of every step of a short fit."""
    record = Losses()
    fit(module, folder, data=data, max_steps=steps, callbacks=[record])
    return record.values
