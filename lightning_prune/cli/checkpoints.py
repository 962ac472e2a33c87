"""Checkpoints as input: read without executing anything, checked before a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.diffusion.pretrained import first_difference
from lightning_prune.protocols import InputError

_WORDS = ("best", "last", "hpc", "registry")


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint. Raises `InputError` naming a missing, damaged or foreign file."""
    if str(file) in _WORDS:
        raise InputError(f"ckpt_path: {file}: give the path; a new run has a folder of its own, with nothing in it")
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise InputError(f"ckpt_path: {file}: no such file") from error
    except Exception as error:
        raise InputError(f"ckpt_path: {file}: cannot be read as a checkpoint of plain tensors") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise InputError(f"ckpt_path: {file}: is no Lightning checkpoint")
    return checkpoint


def check_checkpoint(file: Path, module: nn.Module) -> dict[str, Any]:
    """Read a checkpoint and check that every tensor has its counterpart in `module`.

    Raises:
        InputError: naming the file and the first tensor that does not fit.
    """
    checkpoint = read_checkpoint(file)
    if difference := first_difference(module.state_dict(), checkpoint["state_dict"], "model", "checkpoint"):
        raise InputError(f"ckpt_path: {file}: {difference}")
    return checkpoint
