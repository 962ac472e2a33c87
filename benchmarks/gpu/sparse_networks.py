"""2:4 against dense, whole networks: one call at true sizes, every layer packed that the device's kernels take.

    python benchmarks/gpu/sparse_networks.py

bfloat16 and float16, 1 to 64 images, eager and compiled, in interleaved turns. On a CPU, for toys, the second arm
is the dense network with zeros.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.export.semi_structured import TWO_FOUR, accelerate, unfit
from lightning_prune.pruning.masks import select_units
from lightning_prune.pruning.nm import nm_mask

sys.path.insert(0, str(Path(__file__).parent))
from measure import Cell, Facts, measure, parser
from networks import network, timed_calls

# Minutes of a cell, eager and compiled.
LARGE = {
    "DiT-XL/2": (0.1, 1.5),
    "SDXL": (0.4, 6.0),
    "SD-1.5": (0.1, 3.0),
    "U-ViT-L/2": (0.05, 1.0),
    "U-ViT-S/2": (0.05, 0.7),
}
TOYS = {"toy transformer": (0.0, 0.0)}
Setting = tuple[torch.dtype, str, tuple[int, ...]]
# The most worthwhile first.
SETTINGS: list[Setting] = [
    (torch.bfloat16, "eager", (16, 1, 64, 4)),
    (torch.bfloat16, "compiled", (16,)),
    (torch.bfloat16, "compiled", (1, 64, 4)),
    (torch.float16, "eager", (16, 1, 64, 4)),
    (torch.float16, "compiled", (16, 1, 64, 4)),
]
TOY_SETTINGS: list[Setting] = [(torch.bfloat16, "eager", (2,))]


def prune(denoiser: Denoiser, dtype: torch.dtype, device: torch.device) -> int:
    """Make the linear layers that kernels take 2:4, packed on a GPU; how many there are."""
    units = select_units(denoiser.anatomy(), None, denoiser.default_dense(), 4)
    layers = {unit.name: denoiser.network.get_submodule(unit.name) for unit in units}
    fit = tuple(name for name, layer in layers.items() if unfit(layer, TWO_FOUR, dtype) is None)
    for name in fit:
        weight = layers[name].get_parameter("weight")
        weight.data.mul_(nm_mask(weight, TWO_FOUR))
    if device.type == "cuda":
        accelerate(denoiser.network, fit, device)
    return len(fit)


@lru_cache(maxsize=1)
def pair(name: str, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Denoiser], int]:
    """Both arms, and how many layers are 2:4; cells of one network share them."""
    dense, sparse = (network(name, device, dtype) for _ in range(2))
    packed = prune(sparse, dtype, device)
    return {"dense": dense, "2:4": sparse}, packed


def cells(options: argparse.Namespace, device: torch.device) -> Iterator[Cell]:
    """One call of every network in every setting."""

    def found(name: str, dtype: torch.dtype, batch: int, mode: str) -> Facts:
        arms, packed = pair(name, dtype, device)
        return {"packed_layers": packed, **timed_calls(arms, batch, mode, options.repeats)}

    for dtype, mode, batches in TOY_SETTINGS if options.toy else SETTINGS:
        for (name, minutes), batch in product((TOYS if options.toy else LARGE).items(), batches):
            kind = str(dtype).removeprefix("torch.")
            about = {"network": name, "dtype": kind, "batch": batch}
            make = partial(found, name, dtype, batch, mode)
            yield Cell(f"{name}, {kind}, batch {batch}, {mode}", about, minutes[mode == "compiled"], make, mode)


if __name__ == "__main__":
    sys.exit(measure("sparse_networks", cells, parser(__doc__).parse_args()))
