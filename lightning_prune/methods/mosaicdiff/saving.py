"""Checkpoints that may be larger than memory: statistics lie in mapped files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_prune.files import written_whole


class StreamedCheckpoints(TorchCheckpointIO):
    """Writes tensors from where they lie to the file; Lightning's own makes the whole file in memory first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with written_whole(Path(path)) as partial:
            torch.save(checkpoint, partial)


def stream_checkpoints(strategy: Any) -> None:
    """Have a strategy write its checkpoints so, unless it was given a way of its own."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = StreamedCheckpoints()
