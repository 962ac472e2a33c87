"""A small network begins with what it can take over from a large one of its family (Sanh et al. 2019, DistilBERT)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.metrics.reach import graphs
from lightning_prune.protocols import InputError


@torch.no_grad()
def inherit(student: Denoiser, teacher: Denoiser, blocks: Sequence[int] | None) -> float:
    """Copy every tensor of `teacher` that has the name and shape of one of `student`; in place.

    Args:
        student: the small network.
        teacher: the large one.
        blocks: for each block of the student, in running order, the number of the teacher's block it takes over; None
            takes blocks of the same name.

    Returns:
        Share of the student's parameters that were taken over.

    Raises:
        InputError: blocks that are not there or not as many as the student has, or nothing that fits.
    """
    renamed = {} if blocks is None else _sources(student, teacher, blocks)
    own, other = dict(student.network.named_parameters()), dict(teacher.network.named_parameters())
    taken = 0
    for name, parameter in own.items():
        source = other.get(_renamed(name, renamed))
        if source is not None and source.shape == parameter.shape:
            parameter.copy_(source)
            taken += parameter.numel()
    if taken == 0:
        raise InputError("model.from_teacher: no tensor of the teacher has the name and shape of one of the denoiser")
    return taken / sum(parameter.numel() for parameter in own.values())


def _sources(student: Denoiser, teacher: Denoiser, blocks: Sequence[int]) -> dict[str, str]:
    """The teacher's module by that of the student."""
    (mine, _), (theirs, _) = graphs(student), graphs(teacher)
    shared = next((name for name in mine if name in theirs), None)
    if shared is None:
        raise InputError("model.teacher_blocks: denoiser and teacher have no blocks of one kind")
    own, other = mine[shared].blocks, theirs[shared].blocks
    if len(blocks) != len(own) or not all(0 <= number < len(other) for number in blocks):
        raise InputError(
            f"model.teacher_blocks: {list(blocks)}: give {len(own)} numbers, one a block, below {len(other)}"
        )
    pairs = [(block.modules, other[number].modules) for block, number in zip(own, blocks, strict=True)]
    return {name: source for names, sources in pairs for name, source in zip(names, sources, strict=False)}


def _renamed(name: str, sources: dict[str, str]) -> str:
    for mine, theirs in sources.items():
        if name.startswith(f"{mine}."):
            return theirs + name.removeprefix(mine)
    return name
