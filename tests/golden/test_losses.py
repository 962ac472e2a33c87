"""Losses of a few steps against committed ones: only drift of the whole is caught here, not its cause.

After a deliberate change: `python tests/golden/test_losses.py` prints the new values.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_prune.callbacks import SparsityRamp
from tests.factories import fit, tiny_sparsedm

GOLDEN = [1.337539, 1.323852, 1.289624, 1.27272, 1.193086, 1.208497]


def losses(folder: Path) -> list[float]:
    class Collect(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            self.values.append(float(outputs["loss"]))

    collect, module = Collect(), tiny_sparsedm(decay=1e-3, distill_weight=0.5, label_dropout=0.1)
    fit(module, folder, max_steps=6, callbacks=[SparsityRamp(["3:4", "2:4"], 0.5), collect])
    return collect.values


def test_losses_are_the_committed_ones(tmp_path: Path) -> None:
    assert losses(tmp_path) == pytest.approx(GOLDEN, rel=1e-4)


if __name__ == "__main__":
    print([round(value, 6) for value in losses(Path(tempfile.mkdtemp()))])
