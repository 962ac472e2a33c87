"""2:4 layers in the packed form that sparse tensor cores read: half of the values, and two bits of place for each.

Packing is torch's own, behind a probe: what a device, a type and a shape allow is asked of the installed torch at run
time. Files hold the packed form; what loads them gets valid zeros, and `accelerate` turns layers into
`torch.sparse` semi-structured tensors where there is a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS, to_sparse_semi_structured
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.nm import violations

TWO_FOUR = Sparsity(2, 4)
DTYPES = (torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)
_PACKED, _META = ".packed", ".meta"


def missing(device: torch.device | str) -> str | None:
    """What a device lacks to compute with semi-structured tensors, in words; None if it has all."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device: {device!r} is no device: {str(error).splitlines()[0]}") from error
    if device.type != "cuda":
        return f"{device.type} has no semi-structured kernel; a CUDA device has"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, at least 8.0 is needed"
    return _failure(device)


@cache
def _failure(device: torch.device) -> str | None:
    """What goes wrong with a small layer, in words: libraries of kernels are missing from some builds of torch."""
    for dtype in DTYPES:
        # Not drawn: a probe takes nothing from the random numbers of the program.
        layer = nn.utils.skip_init(nn.Linear, 64, 64, device=device, dtype=dtype).requires_grad_(False)
        layer.bias.zero_()
        layer.weight.copy_(torch.tensor([0, 1, 0, 2]).tile(64, 16))
        x = torch.ones(64, 64, device=device, dtype=dtype)
        expected = layer(x)
        try:
            _pack_in_place(layer)
            product = layer(x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, ValueError) as error:
            return f"a 2:4 product in {dtype} fails: {next(iter(str(error).splitlines()), type(error).__name__)}"
        if not torch.allclose(product, expected, rtol=1e-2):
            return f"a 2:4 product in {dtype} is wrong"
    return None


def _pack_in_place(layer: nn.Module) -> None:
    sparse: Any = to_sparse_semi_structured(layer.get_parameter("weight").detach())
    # Where a release leaves that to the library of the kernel, it writes rows at once; else they are copied behind it.
    sparse.fuse_transpose_cusparselt = True
    layer.register_parameter("weight", nn.Parameter(sparse, requires_grad=False))


def unfit(layer: nn.Module, sparsity: Sparsity, dtype: torch.dtype) -> str | None:
    """Why a layer cannot be packed, in words; None if it can.

    The smallest multiples of rows and columns are those of the installed torch.
    """
    if not sparsity.is_within_2to4:
        return f"{sparsity} may keep more than two of four"
    if not isinstance(layer, nn.Linear):
        return f"a {type(layer).__name__.removeprefix('Masked')}; kernels are for linear layers"
    if dtype not in DTYPES:
        return f"{dtype} is neither float16 nor bfloat16"
    limits = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS[dtype]
    rows, columns = layer.weight.shape
    if rows % limits.sparse_min_rows or columns % limits.sparse_min_cols:
        return f"{rows} x {columns} is no multiple of {limits.sparse_min_rows} x {limits.sparse_min_cols}"
    return None


@dataclass(frozen=True)
class Plan:
    """Which layers are packed, and why the others are not, by qualified name."""

    packed: tuple[str, ...]
    dense: dict[str, str]


def plan(network: nn.Module, patterns: Mapping[str, Sparsity], dtype: torch.dtype) -> Plan:
    """What of the masked layers of a network can be packed in `dtype`.

    Raises:
        InputError: none can.
    """
    reasons = {name: unfit(network.get_submodule(name), sparsity, dtype) for name, sparsity in patterns.items()}
    packed = tuple(name for name, reason in reasons.items() if reason is None)
    if not packed:
        reason = next(iter(reasons.values()), None) or "no layer is masked"
        raise InputError(f"--format: no layer can be semi-structured: {reason}")
    return Plan(packed, {name: reason for name, reason in reasons.items() if reason})


def pack(state: Mapping[str, Tensor], packed: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict in `dtype` with every weight of `packed` layers as `<name>.weight.packed` and `.meta`.

    Raises:
        InputError: a weight with more than two non-zeros in a group of four.
    """
    weights = {f"{name}.weight" for name in packed}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        value = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if name not in weights:
            result[name] = value
            continue
        if violations(value, TWO_FOUR):
            raise InputError(f"--format: {name} is not 2:4: a group of four holds more than two values")
        result[name + _PACKED], result[name + _META] = sparse_semi_structured_from_dense_cutlass(value)
    return result


def unpack(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that `pack` was given, with valid zeros."""
    result: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(_PACKED):
            weight = name.removesuffix(_PACKED)
            result[weight] = sparse_semi_structured_to_dense_cutlass(tensor, stored[weight + _META])
        elif not name.endswith(_META):
            result[name] = tensor
    return result


def accelerate(network: nn.Module, packed: tuple[str, ...], device: torch.device | str) -> nn.Module:
    """Move a network to `device` and turn its packed layers into semi-structured tensors, in place.

    What these layers read and give is contiguous; names in state dicts stay.

    Raises:
        InputError: naming what the device lacks.
    """
    if reason := missing(device):
        raise InputError(f"device: {reason}")
    network.to(device)
    for name in packed:
        layer = network.get_submodule(name)
        _pack_in_place(layer)
        if contiguous_input not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(contiguous_input)
            layer.register_forward_hook(contiguous_output)
    return network


def contiguous_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook before a layer. Torch's semi-structured product views its input as rows, which not every stride allows.

    Diffusers' transformers read such inputs: permuted images, and slices of joint sequences.
    """
    return (args[0].contiguous(), *args[1:])


def contiguous_output(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A hook behind a layer. Some releases of torch give columns one after the other, which attention is slow on."""
    return output.contiguous()


def stored_bytes(tensor: Tensor) -> int:
    """Memory that a tensor takes; of a semi-structured one what it is packed into."""
    if not isinstance(tensor.data, SparseSemiStructuredTensor):
        return tensor.nbytes
    names, _ = tensor.data.__tensor_flatten__()
    return sum(int(getattr(tensor.data, name).nbytes) for name in names)
