"""What processes measure on, as a checkpoint holds it and gives it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

from lightning_prune.diffusion.conditions import move
from lightning_prune.module import Batch
from lightning_prune.world import World


def stored(batches: Iterable[Batch]) -> list[Batch]:
    """Ids and conditions of batches, on the CPU."""
    return [{"id": batch["id"].cpu(), "cond": move(batch["cond"], "cpu")} for batch in batches]


def by_process(gathered: Any) -> list[Any]:
    """What this process had stored, alone; of a run of another number of processes, what each of them had.

    Args:
        gathered: by rank, as `World.gather` gives it; None is nothing. Checkpoints of earlier versions hold what the
            first process had.
    """
    if not gathered:
        return []
    earlier = isinstance(gathered, Mapping) or (isinstance(gathered[0], Mapping) and "id" in gathered[0])
    parts = [gathered] if earlier else list(gathered)
    world = World.current()
    return [parts[world.rank]] if len(parts) == world.size else parts


def own_batches(gathered: Any) -> list[Batch]:
    """This process' batches; of a run of another number of processes its share of all, in the order they came in."""
    parts, world = by_process(gathered), World.current()
    if len(parts) < 2:
        return [batch for part in parts for batch in part]
    together = [batch for turn in zip_longest(*parts) for batch in turn if batch is not None]
    return together[world.rank :: world.size] or together
