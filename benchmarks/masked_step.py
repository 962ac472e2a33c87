"""What a masked training step costs: SparseDM against dense, interleaved, on the embedded transformer.

    python benchmarks/masked_step.py

Batch 64, fp32, averaging and teacher off in both arms, masks refreshed after every optimizer step. The last line is
JSON; `ratio` is the median of the masked arm's seconds over the median of the dense arm's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable

import torch
from torch.nn.functional import mse_loss

from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.process import Process
from lightning_prune.metrics.latency import interleaved_seconds
from lightning_prune.protocols import Sparsity
from lightning_prune.pruning.masks import MaskSet, select_units


def training_step(masked: bool, batch: int, decay: float) -> Callable[[], None]:
    """A function that runs one optimizer step of the dense or of the 2:4 network on a fixed batch."""
    torch.manual_seed(0)
    denoiser, process = DiT(weights="embedded:fashion_dit"), Process(schedule="cosine", prediction="v")
    masks = None
    if masked:
        units = select_units(denoiser.anatomy(), None, denoiser.default_dense(), 4)
        masks = MaskSet(denoiser.network, units, Sparsity(2, 4))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-5)
    x0, noise = torch.randn(2, batch, *denoiser.sample_shape)
    t, labels = torch.randint(0, process.timesteps, (batch,)), torch.randint(0, 10, (batch,))

    def step() -> None:
        loss = mse_loss(denoiser(process.add_noise(x0, noise, t), t, labels), process.target(x0, noise, t))
        optimizer.zero_grad()
        loss.backward()
        if masks is not None:
            masks.add_decay(decay)
        optimizer.step()
        if masks is not None:
            masks.refresh()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    arms = {name: training_step(name == "masked", options.batch, 2e-4) for name in ("dense", "masked")}
    seconds = interleaved_seconds(arms, options.pairs)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pairwise = sorted(m / d for m, d in zip(seconds["masked"], seconds["dense"], strict=True))
    result = {
        "ratio": medians["masked"] / medians["dense"],
        "ratio_quartiles": [pairwise[len(pairwise) // 4], pairwise[3 * len(pairwise) // 4]],
        "dense_seconds": medians["dense"],
        "masked_seconds": medians["masked"],
        "pairs": options.pairs,
        "batch": options.batch,
        "threads": options.threads,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
