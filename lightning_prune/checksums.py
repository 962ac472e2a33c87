"""Checksums of files, and of samples."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

DIGESTS = 1 << 256
"""Sums of digests are taken modulo this."""


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(samples: Tensor) -> int:
    """The SHA-256 digests of samples [B, ...], summed: the same in whatever order and batches they come."""
    rows = samples.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return sum(int.from_bytes(hashlib.sha256(row.tobytes()).digest(), "big") for row in rows) % DIGESTS
