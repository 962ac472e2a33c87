"""What the blocks of a network cost, in MACs or in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lightning_prune.blocks import BlockCosts, BlockGraph, CacheMode, GateSchedule
from lightning_prune.diffusion.gated import gated
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.metrics.latency import interleaved_medians
from lightning_prune.metrics.macs import Convention, Ledger, count_denoiser
from lightning_prune.pruning.masks import patterns_now

_TURNS = 7


def block_costs(ledger: Ledger, graph: BlockGraph, convention: Convention = "aten") -> BlockCosts:
    """MACs of the modules of every block, and of what is outside all blocks.

    Right where a block's modules work for it alone; `traced_costs` needs no such thing.
    """
    blocks = tuple(sum(ledger.inside(name, convention) for name in block.modules) for block in graph.blocks)
    shell = ledger.macs(convention) - sum(blocks)
    return BlockCosts(blocks, shell)


def traced_costs(denoiser: Denoiser, granularity: str, mode: CacheMode, convention: Convention = "aten") -> BlockCosts:
    """MACs, under masks where layers have them, that skipping each block alone saves in one call for one image.

    By tracing it skipped: a module inside a block may also work for the layers behind all blocks, as the embedding of
    DiT's first block does; that part stays with the shell.
    """
    graph = denoiser.blocks(granularity).in_mode(mode)

    def counted(traced: Denoiser) -> int:
        return int(count_denoiser(traced).kept(patterns_now(denoiser.network), convention))

    dense = counted(denoiser)
    blocks = []
    for position in range(len(graph)):
        row = tuple(i != position for i in range(len(graph)))
        pruned: Any = gated(denoiser, GateSchedule(granularity, mode, graph.names, (graph.full(), row)))
        for step in (0, 1):
            pruned.at_step(step, 2)
            left = counted(pruned)
        blocks.append(dense - left)
    shell = dense - sum(blocks)
    return BlockCosts(tuple(blocks), shell)


def timed_costs(denoiser: Denoiser, schedule: GateSchedule, process: Process, images: int) -> BlockCosts:
    """Nanoseconds that skipping each block alone saves in a call for some images, on the device the denoiser is on.

    What is saved is measured in turns with the whole call; a block that takes no measurable time costs nothing.

    Args:
        denoiser: the network.
        schedule: any one, for how skipped blocks are reused.
        process: how predictions are read.
        images: batch of a call.
    """
    graph = denoiser.blocks(schedule.granularity).in_mode(schedule.cache_mode)
    arms = {"": _second_call(denoiser, replace(schedule, rows=(graph.full(), graph.full())), process, images)}
    for position, name in enumerate(graph.names):
        row = tuple(i != position for i in range(len(graph)))
        arms[name] = _second_call(denoiser, replace(schedule, rows=(graph.full(), row)), process, images)
    seconds = interleaved_medians(arms, _TURNS)
    dense = round(seconds[""] * 1e9)
    saved = [max(0, dense - round(seconds[name] * 1e9)) for name in graph.names]
    # Where several run at once, each alone saves more than its part of the whole.
    scale = min(1.0, dense / max(1, sum(saved)))
    blocks = tuple(int(part * scale) for part in saved)
    return BlockCosts(blocks, dense - sum(blocks))


def _second_call(denoiser: Denoiser, schedule: GateSchedule, process: Process, images: int) -> Callable[[], object]:
    """A call in the second step of a schedule, with what the first left behind."""
    weight = next(p for p in denoiser.network.parameters() if p.is_floating_point())
    x = torch.zeros(images, *denoiser.sample_shape, device=weight.device, dtype=weight.dtype)
    times = torch.tensor([process.timesteps - 1, process.timesteps // 2], device=weight.device)
    cond = denoiser.blank_condition(images, weight.device)
    pruned: Any = gated(denoiser, schedule, process).eval()
    with torch.no_grad():
        pruned.at_step(0, 2)
        pruned(x, times[:1].expand(images), cond)

    @torch.no_grad()
    def call() -> object:
        pruned.at_step(1, 2)
        return pruned(x, times[1:].expand(images), cond)

    return call
