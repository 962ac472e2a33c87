"""An estimate of the memory one training step takes, from shapes alone.

Weights, gradients, optimizer state and copies are exact. Activations are what the network's forward pass saves for its
backward pass, attention as a fused kernel does it; workspaces, fragmentation and the allocator's slack come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_prune.diffusion.models import Denoiser


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    teacher: int
    masks: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


class _FusedAttention(torch.autograd.Function):
    """Saves what a fused attention kernel saves: its inputs, its output and one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Kernels lay heads side by side behind the tokens, so that joining them again copies nothing.
        *batch, heads, length, _ = query.shape
        output = query.new_empty((*batch, length, heads, value.shape[-1])).transpose(-3, -2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("shapes only")


class _Fused(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        return _FusedAttention.apply(named["query"], named["key"], named["value"])


def activation_bytes(denoiser: Denoiser, batch: int, bytes_each: int) -> int:
    """Bytes that the forward pass of a batch saves for the backward pass; the network is on the meta device.

    `bytes_each` is the size of a number in the precision trained in.
    """
    x = torch.zeros(1, *denoiser.sample_shape, device="meta")
    t = torch.zeros(1, device="meta", dtype=torch.long)
    cond = denoiser.blank_condition(1, "meta")
    own = {_storage(tensor) for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if tensor.is_meta and key not in own:
            # Held, so that no other tensor takes its place in memory and its number.
            saved[key] = (tensor.untyped_storage().nbytes() // tensor.element_size(), tensor)
        return tensor

    with torch.enable_grad(), _Fused(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        denoiser(x, t, cond)
    return batch * bytes_each * sum(count for count, _ in saved.values())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def optimizer_bytes(make: Callable[[list[nn.Parameter]], Optimizer], parameters: list[nn.Parameter]) -> int:
    """Bytes of an optimizer's state after a step on parameters of the meta device."""
    if not parameters:
        return 0
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in states if isinstance(value, Tensor))
    finally:
        for parameter in parameters:
            parameter.grad = None
