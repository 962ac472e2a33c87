"""A masked training step against a dense one at the true size of DiT-XL/2, and evaluation throughput of FID.

    python benchmarks/gpu/training.py

bfloat16 autocast, random weights, which serve for time. Masks are derived again after every optimizer step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import mse_loss

from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.process import Process
from lightning_prune.protocols import Sparsity
from lightning_prune.pruning.masks import MaskSet, select_units

sys.path.insert(0, str(Path(__file__).parent))
from measure import attempt, cell, device_or_none, parser, write

XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
TOY = XL | {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}


def step(config: dict[str, Any], masked: bool, batch: int, device: torch.device) -> Callable[[], None]:
    """A function that runs one optimizer step on a fixed batch."""
    torch.manual_seed(0)
    denoiser, process, masks = DiT(config=config).to(device), Process(clip_sample=False), None
    if masked:
        units = select_units(denoiser.anatomy(), None, denoiser.default_dense(), 4)
        masks = MaskSet(denoiser.network, units, Sparsity(2, 4))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-5)
    x0, noise = torch.randn(2, batch, *denoiser.sample_shape, device=device)
    t = torch.randint(0, process.timesteps, (batch,), device=device)
    labels = torch.randint(0, denoiser.num_classes, (batch,), device=device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = mse_loss(denoiser(process.add_noise(x0, noise, t), t, labels), process.target(x0, noise, t))
        loss.backward()
        if masks is not None:
            masks.add_decay(2e-4)
        optimizer.step()
        optimizer.zero_grad()
        if masks is not None:
            masks.refresh()

    return run


def main() -> int:
    """Measure and print."""
    options = parser(__doc__).parse_args()
    device = device_or_none(options.toy)
    if device is None:
        return 0
    config, batches = (TOY, (2,)) if options.toy else (XL, (32, 64))
    cells = []
    for batch in batches:
        arms = {"dense": step(config, False, batch, device), "masked": step(config, True, batch, device)}
        cells.append({"network": "DiT-XL/2", "batch": batch, **attempt(lambda: cell(arms, options.repeats))})  # noqa: B023
        print(cells[-1], flush=True)
    return write("training", device, cells, options.toy)


if __name__ == "__main__":
    sys.exit(main())
