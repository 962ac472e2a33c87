"""Parameters that are spread over processes: the part that is here, and all of it.

Two engines spread them. FSDP2's are tensors of rows (`DTensor`). DeepSpeed's stage 3 keeps plain parameters that are
empty between calls of their layer, and beside each, as `ds_tensor`, an equal piece of its flattened and padded values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.nn import functional as F


def in_pieces(parameter: Tensor) -> bool:
    """Whether DeepSpeed's stage 3 keeps this parameter, as flat pieces that know no rows."""
    return hasattr(parameter, "ds_tensor")


def is_spread(parameter: Tensor) -> bool:
    """Whether processes hold different parts of this parameter."""
    return isinstance(parameter, DTensor) or in_pieces(parameter)


def local(tensor: Tensor) -> Tensor:
    """This process' rows of a tensor that is spread over processes, sharing its memory; else the tensor itself."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def held(parameter: Any) -> Tensor:
    """What this process holds of a parameter between calls, sharing its memory. In pieces, only there is the value."""
    return parameter.ds_tensor if in_pieces(parameter) else parameter  # type: ignore[no-any-return]


def shape(parameter: Any) -> torch.Size:
    """Shape of the whole parameter."""
    return parameter.ds_shape if in_pieces(parameter) else parameter.shape  # type: ignore[no-any-return]


def full(parameter: Any, part: Tensor | None = None) -> Tensor:
    """A parameter in one piece, detached; or of what is spread like it, such as its average, given this process' part.

    All processes call it together.
    """
    detached = (held(parameter) if part is None else part).detach()
    if isinstance(detached, DTensor):
        return detached.full_tensor()
    if not in_pieces(parameter):
        return detached.clone()
    group = parameter.ds_process_group
    pieces = [torch.empty_like(detached) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(pieces, detached.contiguous(), group=group)
    return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape)


def piece_of(parameter: Any, value: Tensor) -> Tensor:
    """This process' piece of `value`, the whole of a parameter that is kept in pieces."""
    size, rank = parameter.ds_tensor.numel(), distributed.get_rank(parameter.ds_process_group)
    missing = size * distributed.get_world_size(parameter.ds_process_group) - value.numel()
    return F.pad(value.flatten(), (0, missing)).narrow(0, size * rank, size)


def forget_whole(parameter: Any) -> None:
    """Let go of a whole copy, which DeepSpeed keeps of small parameters, after their pieces were changed."""
    if in_pieces(parameter) and parameter.shape == parameter.ds_shape:
        parameter.partition()
