"""What a step of the DiP-GO search costs: its time against plain sampling, and how its memory grows with the steps.

    python benchmarks/dipgo_search.py

The embedded transformer, gates for attention and feed-forward parts, fp32. `ratio_time` is the median of the seconds of
a search step, teacher cached, over the median of those of sampling the same batch with the dense network without
gradients, interleaved. `ratio_memory` is the peak memory of a search of 50 steps beyond what is there after loading,
over that of 10 steps, each in a process of its own, both without the latents and stored values that every step keeps,
which are computed and printed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.recall import stored_tensors
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.methods.dipgo import DiPGO
from lightning_prune.metrics.latency import interleaved_seconds

SHORT, LONG = 10, 50
_PEAK = 5  # what /proc/self/clear_refs takes to forget the peak


class Search(DiPGO):
    """The search without a trainer: every step is the first."""

    @property
    def _index(self) -> int:
        return 0


def search_step(steps: int, batch: int) -> tuple[Search, Callable[[], None]]:
    """The module, and a function that runs one optimizer step of a search over `steps` sampling steps."""
    module = Search(
        DiT(weights="embedded:fashion_dit"),
        Process(schedule="cosine", prediction="v"),
        Sampler(steps=steps),
        granularity="half",
        budget=0.5,
    )
    optimizer = torch.optim.Adam(module.pruner.parameters(), lr=0.1)
    ids = torch.arange(batch)
    given = {"id": ids, "cond": ids % module.denoiser.num_classes}
    module.train()
    module.teacher.images(ids, ids, given["cond"])

    def step() -> None:
        loss, _ = module.loss(given, torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return module, step


def time_ratio(steps: int, batch: int, turns: int) -> dict[str, float]:
    """Medians of a search step and of plain sampling, and their ratio."""
    module, step = search_step(steps, batch)
    ids = torch.arange(batch)

    def sample() -> None:
        sample_images(module.denoiser, module.process, ids, ids % 10, module.problem.sampler)

    seconds = interleaved_seconds({"search": step, "sample": sample}, turns)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "search_seconds": medians["search"],
        "sample_seconds": medians["sample"],
        "ratio_time": medians["search"] / medians["sample"],
    }


def peak_memory(steps: int, batch: int) -> dict[str, int]:
    """Peak bytes of this process in one search step beyond those after loading, and the bytes that steps store."""
    module, step = search_step(steps, batch)
    Path("/proc/self/clear_refs").write_text(str(_PEAK))
    before = _status("VmRSS")
    step()
    return {"peak": _status("VmHWM") - before, "stored": _stored(module, steps, batch)}


def _stored(module: Search, steps: int, batch: int) -> int:
    """Latents and stored values of every step but the first, whose recomputation needs no more than the latent."""
    unroll, network = module.unroll, module.unroll.denoiser
    x, t = torch.zeros(batch, *network.sample_shape), torch.zeros(batch, dtype=torch.long)
    with torch.no_grad():
        full, empty = unroll.graph.full(), [None] * len(unroll.graph)
        _, slots = unroll.gating.step(lambda: network(x, t, t), full, empty, t.float())
    kept = stored_tensors([slots, unroll.skipped_step.remember(None, x, x, t)])
    return steps * (x.nbytes + sum(tensor.nbytes for tensor in kept))


def _status(key: str) -> int:
    """A figure of this process in bytes, from Linux."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def memory_ratio(batch: int, threads: int) -> dict[str, Any]:
    """Peaks of both lengths, each in a fresh process, and their ratio without what steps store."""
    found = {}
    for steps in (SHORT, LONG):
        command = [sys.executable, __file__, "--peak-of", str(steps), "--memory-batch", str(batch)]
        done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
        found[steps] = json.loads(done.stdout.splitlines()[-1])
    net = {steps: one["peak"] - one["stored"] for steps, one in found.items()}
    return {
        **{f"peak_bytes_{steps}": one["peak"] for steps, one in found.items()},
        **{f"stored_bytes_{steps}": one["stored"] for steps, one in found.items()},
        "ratio_memory": net[LONG] / net[SHORT],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="batch whose seconds are measured")
    parser.add_argument("--memory-batch", type=int, default=64, help="batch whose memory is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    if options.peak_of:
        print(json.dumps(peak_memory(options.peak_of, options.memory_batch)))
        return
    result = {
        **time_ratio(LONG, options.batch, options.turns),
        **memory_ratio(options.memory_batch, options.threads),
        "steps": LONG,
        "batch": options.batch,
        "memory_batch": options.memory_batch,
        "turns": options.turns,
        "threads": options.threads,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
