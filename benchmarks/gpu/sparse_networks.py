"""2:4 against dense, whole networks: one call at true sizes, every layer packed that the device's kernels take.

    python benchmarks/gpu/sparse_networks.py

bfloat16 and float16, 1 to 64 images, eager and compiled, in interleaved turns. Without a kernel, as on a CPU, the
second arm is the dense network with zeros.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.export.semi_structured import TWO_FOUR, accelerate, missing, unfit
from lightning_prune.pruning.masks import select_units
from lightning_prune.pruning.nm import nm_mask

sys.path.insert(0, str(Path(__file__).parent))
from measure import device_or_none, parser, write
from networks import network, timed

LARGE = ("U-ViT-S/2", "U-ViT-L/2", "DiT-XL/2", "SD-1.5", "SDXL")
BATCHES, TOY_BATCHES = (1, 4, 16, 64), (2,)


def prune(denoiser: Denoiser, dtype: torch.dtype, device: torch.device) -> int:
    """Make the linear layers that kernels take 2:4, packed where there is a kernel; how many there are."""
    units = select_units(denoiser.anatomy(), None, denoiser.default_dense(), 4)
    layers = {unit.name: denoiser.network.get_submodule(unit.name) for unit in units}
    fit = tuple(name for name, layer in layers.items() if unfit(layer, TWO_FOUR, dtype) is None)
    for name in fit:
        weight = layers[name].get_parameter("weight")
        weight.data.mul_(nm_mask(weight, TWO_FOUR))
    if missing(device) is None:
        accelerate(denoiser.network, fit, device)
    return len(fit)


def main() -> int:
    """Measure and print."""
    options = parser(__doc__).parse_args()
    device = device_or_none(options.toy)
    if device is None:
        return 0
    names, batches = (("toy transformer",), TOY_BATCHES) if options.toy else (LARGE, BATCHES)
    dtypes = (torch.bfloat16,) if options.toy else (torch.bfloat16, torch.float16)
    cells = []
    for name, dtype in product(names, dtypes):
        dense, sparse = (network(name, device, dtype) for _ in range(2))
        packed = prune(sparse, dtype, device)
        for batch, compiled in product(batches, (False,) if options.toy else (False, True)):
            arms = {"dense": dense, "2:4": sparse}
            found = timed(arms, batch, compiled, options.repeats)
            about = {"network": name, "dtype": str(dtype).removeprefix("torch."), "batch": batch}
            cells.append({**about, "compiled": compiled, "packed_layers": packed, **found})
            print(cells[-1], flush=True)
        torch.compiler.reset()
    return write("sparse_networks", device, cells, options.toy)


if __name__ == "__main__":
    sys.exit(main())
