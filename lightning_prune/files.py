"""Writing a file so that it is either complete or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lightning_prune.protocols import InputError


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Give a partial file to write, which becomes `file` when the block has ended; an error leaves neither behind.

    Raises:
        InputError: the folder cannot be made or written.
    """
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
