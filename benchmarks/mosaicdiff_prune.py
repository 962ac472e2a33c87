"""What pruning costs: statistics and surgery of all stages against sampling, and the greedy loop against a naive one.

    python benchmarks/mosaicdiff_prune.py

* `ratio_sampling`: seconds to collect statistics and to prune every stage over seconds to sample 1,000 images with the
  dense network (1,000 times the seconds an image of 64, drawn in turn with the pruning).
* `ratio_memory`: the most memory that is in use at once while pruning, the dense network and the slim stages included,
  over the dense network at work and the statistics of one layer group. At work means sampling the 64 images that
  seconds are compared with: calibration calls the network on batches of as many, and no method that calls it at all
  does with less than its weights and the activations of a call. Statistics of a group are four matrices of the widest
  in float64: second moments, their inverse, the Gram matrix of the weights and one working copy. All other statistics
  and outputs of layers are in files.
* `ratio_memory_without_activations`: the same over the weights and the statistics of one layer group alone.
* `ratio_resident`: as `ratio_memory`, of the pages that no file backs. What the C library has been given back and
  keeps is in it, on both sides; with these small networks (no tensor is above its limit of 32 MB for returning memory
  at once) that is as much as is in use, and differs from run to run.
* `speedup_over_naive`: seconds of the published loop, a Python loop over columns, over ours, on one feed-forward layer;
  both end with the same columns and the same weights.

Memory in use is what the C library has handed out (`mallinfo2`, glibc 2.33 or later), a thousand times a second. It is
measured in a pruning of its own, since watching takes time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.data import EmbeddedFashion
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.methods.mosaicdiff.plan import (
    draw_in_bins,
    refine,
    sampling_grid,
    stages_for,
)
from lightning_prune.methods.mosaicdiff.pruner import Pruner
from lightning_prune.methods.mosaicdiff.recipe import Recipe
from lightning_prune.methods.mosaicdiff.sensitivity import Probe
from lightning_prune.pruning.curvature import Curvature
from lightning_prune.pruning.obs import Layer, columns_of, greedy_removal

PROCESS = Process(schedule="cosine", prediction="v")
RECALIBRATION_IMAGES = 256


_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Allocations(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _FIELDS)


@cache
def _library() -> Any:
    read = ctypes.CDLL(None).mallinfo2
    read.restype = _Allocations
    return read


def in_use() -> int:
    """Bytes that the C library has handed out."""
    found = _library()()
    return int(found.uordblks + found.hblkhd)


def resident() -> int:
    """Bytes of this process that no file backs (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not report RssAnon")


class Peak:
    """Largest growth of this process' memory since `Peak.began`, while the block runs: in use, and resident."""

    began: tuple[int, int] = (0, 0)

    @classmethod
    def begin(cls) -> None:
        """Count from here on."""
        cls.began = in_use(), resident()

    def __enter__(self) -> Peak:
        self.in_use = self.resident = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.in_use = max(self.in_use, in_use() - self.began[0])
            self.resident = max(self.resident, resident() - self.began[1])

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def prune(
    dense: DiT, sampler: Sampler, recipe: Recipe, batches: list[tuple[Tensor, Tensor]], target: float, folder: Path
) -> None:
    """Statistics of all stages and layers from batches of images and labels, then the recipe's stages."""
    grid = sampling_grid(PROCESS, sampler)
    bins = refine([stages_for(recipe, grid, 1.0)])
    curvature = Curvature(dense.network, dense.groups(), len(bins), folder)
    visited, generator = sampler.visited(PROCESS), torch.Generator().manual_seed(0)
    for x0, cond in batches:
        bin_of, t = draw_in_bins(bins, visited, PROCESS, len(x0), generator)
        noise = torch.randn(x0.shape, generator=generator)
        with torch.no_grad(), curvature.collecting(bin_of):
            dense(PROCESS.add_noise(x0, noise, t), t, cond)
    probe = Probe(dense, PROCESS, sampler, torch.arange(16) % 10, seed=1)
    kept = batches[: -(-RECALIBRATION_IMAGES // len(batches[0][0]))]
    Pruner(dense, PROCESS, sampler, bins, curvature, 1.0, 1e-3, probe, kept=kept).prune(recipe, target)


def calibration(batches: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of training images and their labels."""
    images, found = EmbeddedFashion().split("train"), []
    for number in range(batches):
        rows = images.__getitems__(list(range(number * batch, (number + 1) * batch)))
        found.append((torch.stack([r["x"] for r in rows]), torch.stack([r["cond"] for r in rows])))
    return found


def naive(weight: Tensor, hessian: Tensor, removals: int) -> tuple[list[int], Tensor]:
    """The published loop, a column at a time: score every column, remove one, update weight and inverse."""
    w, p, order = weight.clone(), torch.linalg.inv(hessian), []
    left = list(range(len(hessian)))
    for _ in range(removals):
        scores = [float((w[:, j] @ w[:, j]) / p[j, j]) for j in left]
        j = left.pop(scores.index(min(scores)))
        w -= torch.outer(w[:, j], p[j] / p[j, j])
        p -= torch.outer(p[:, j], p[j] / p[j, j])
        p[j], p[:, j] = 0, 0
        p[j, j] = 1
        w[:, j] = 0
        order.append(j)
    return order, w


def ours(weight: Tensor, hessian: Tensor, removals: int) -> tuple[list[int], Tensor]:
    """The whole order, then one refit."""
    layer = Layer.of(weight, hessian, damping=0.0)
    removal = greedy_removal(layer, len(hessian), 1)
    kept = columns_of(removal.kept(removals), 1, len(hessian), len(hessian))
    refit = torch.zeros_like(layer.weight)
    refit[:, kept] = layer.refit(kept)
    return list(removal.order[:removals]), refit


def speedup(width: int, rows: int, out: int) -> tuple[float, float]:
    """Seconds of the naive loop over ours for half of `width` columns, and the largest difference of their weights."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(width, dtype=torch.float64) + 0.1 * torch.randn(width, width, generator=generator).double()
    x = torch.randn(rows, width, generator=generator).double() @ mix
    weight, hessian = torch.randn(out, width, generator=generator).double(), x.T @ x
    seconds, found = [], []
    for function in (naive, ours):
        began = time.perf_counter()
        found.append(function(weight, hessian, width // 2))
        seconds.append(time.perf_counter() - began)
    if found[0][0] != found[1][0]:
        raise RuntimeError("the two loops removed different columns")
    return seconds[0] / seconds[1], float((found[0][1] - found[1][1]).abs().max())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10, help="calibration batches")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--target", type=float, default=0.33)
    parser.add_argument("--width", type=int, default=512, help="columns of the layer the loops are compared on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    dense, sampler = DiT(weights="embedded:fashion_dit").eval().requires_grad_(False), Sampler(steps=options.steps)
    ids, cond, sampling = torch.arange(64), torch.arange(64) % 10, []

    def sample() -> None:
        began = time.perf_counter()
        sample_images(dense, PROCESS, ids, cond, sampler)
        sampling.append((time.perf_counter() - began) / 64)

    batches, recipe = calibration(options.batches, options.batch), Recipe(stages=5)
    Peak.begin()
    with Peak() as work:
        sample()
    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        prune(dense, sampler, recipe, batches, options.target, Path(folder))
    sampling.clear()
    sample()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        prune(dense, sampler, recipe, batches, options.target, Path(folder))
        pruning = time.perf_counter() - began
    sample()
    seconds_per_image = sum(sampling) / len(sampling)
    largest = max(g.units * g.columns + 1 for g in dense.groups())
    one_group = 4 * 8 * largest**2
    network = sum(p.numel() * p.element_size() for p in dense.parameters())
    factor, difference = speedup(options.width, 4 * options.width, 128)
    result = {
        "ratio_sampling": pruning / (1000 * seconds_per_image),
        "ratio_memory": (network + peak.in_use) / (network + work.in_use + one_group),
        "speedup_over_naive": factor,
        "ratio_memory_without_activations": (network + peak.in_use) / (network + one_group),
        "ratio_resident": (network + peak.resident) / (network + work.resident + one_group),
        "largest_difference": difference,
        "prune_seconds": pruning,
        "seconds_per_image": seconds_per_image,
        "network_bytes": network,
        "layer_group_bytes": one_group,
        "sampling_in_use_bytes": work.in_use,
        "pruning_in_use_bytes": peak.in_use,
        "sampling_resident_bytes": work.resident,
        "pruning_resident_bytes": peak.resident,
        "threads": options.threads,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
