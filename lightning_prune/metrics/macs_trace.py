"""Two independent counts of one forward pass: from the shapes of its layers, and from the operations it runs.

The first reads layers and attention calls as a person would, with a formula for each. The second sits below
them at the dispatcher, sees every product that is carried out, and knows nothing of layers. Both file what
they count under the same scope, a pair of layer and kind, so that a disagreement has a name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["linear", "conv", "attention", "norm", "other"]


class Scope(NamedTuple):
    """Where a product belongs: the qualified name of a module, and what kind of work it is."""

    layer: str
    kind: Kind


@dataclass
class Trace:
    """What one forward pass did, by scope.

    Attributes:
        calls: how often a layer or an attention call ran.
        products: multiply-accumulates from shapes; none for "other", which has no formula.
        elementwise: what the `module` convention counts beside the products.
        dispatched: multiply-accumulates seen by the dispatcher.
        path: the scopes around the operation that runs right now, innermost last.
    """

    calls: Counter[Scope] = field(default_factory=Counter)
    products: Counter[Scope] = field(default_factory=Counter)
    elementwise: Counter[Scope] = field(default_factory=Counter)
    dispatched: Counter[Scope] = field(default_factory=Counter)
    path: list[Scope] = field(default_factory=lambda: [Scope("", "other")])

    def add(self, scope: Scope, products: int, elementwise: int = 0) -> None:
        self.calls[scope] += 1
        self.products[scope] += products
        self.elementwise[scope] += elementwise

    @contextmanager
    def within(self, kind: Kind) -> Iterator[Scope]:
        """A scope of another kind inside the module that runs right now."""
        self.path.append(Scope(self.path[-1].layer, kind))
        yield self.path[-1]
        self.path.pop()


def trace(network: nn.Module, call: Callable[[], Any]) -> Trace:
    """Count what `network` does during `call`, which runs without gradients and leaves no hook behind."""
    record = Trace()
    with torch.no_grad(), _hooks(network, record), _Functions(record), _Dispatcher(record):
        call()
    return record


# The count from shapes: layers

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RMSNorm, nn.modules.batchnorm._NormBase)


def layer_kind(module: nn.Module) -> Kind:
    """The kind of work a module does itself; "other" where only its children or functions work."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, _CONVS):
        return "conv"
    return "norm" if isinstance(module, _NORMS) else "other"


@contextmanager
def _hooks(network: nn.Module, record: Trace) -> Iterator[None]:
    """Hooks on every module that keep `record.path` current and count layers."""
    with ExitStack() as stack:
        for name, module in network.named_modules():
            for handle in _hook(module, Scope(name, layer_kind(module)), record):
                stack.callback(handle.remove)
        yield


def _hook(module: nn.Module, scope: Scope, record: Trace) -> list[Any]:
    def enter(layer: nn.Module, args: tuple[Any, ...]) -> None:
        record.path.append(scope)

    def leave(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record.path.pop()
        if scope.kind != "other":
            x = args[0] if args else next(iter(kwargs.values()))
            record.add(scope, _layer_products(layer, x, output), _layer_elementwise(layer, output))

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, with_kwargs=True),
    ]


def _layer_products(layer: nn.Module, x: Tensor, output: Tensor) -> int:
    # The shape of the weight is read, not the attributes beside it, which surgery may have left behind.
    if isinstance(layer, nn.Linear):
        return _linear_products(layer.weight, output)
    if isinstance(layer, _CONVS):
        return _conv_products(layer.weight, x, output, isinstance(layer, _TRANSPOSED))
    return 0


def _layer_elementwise(layer: nn.Module, output: Tensor) -> int:
    """A linear bias counts once for all tokens; biases of convolutions, and norms, count per element."""
    if isinstance(layer, _NORMS):
        return output.numel() * (1 if getattr(layer, "weight", None) is None else 2)
    bias = getattr(layer, "bias", None)
    if bias is None:
        return 0
    return int(bias.numel()) if isinstance(layer, nn.Linear) else output.numel()


def _linear_products(weight: Tensor, output: Tensor) -> int:
    """For `weight` [out, in]."""
    return output.numel() * weight.shape[1]


def _conv_products(weight: Tensor, x: Tensor, output: Tensor, transposed: bool) -> int:
    """For `weight` [out, in / groups, *kernel], transposed [in, out / groups, *kernel]; padding counts."""
    return (x if transposed else output).numel() * weight.shape[1:].numel()


def _attention_products(query: Tensor, key: Tensor, value: Tensor) -> int:
    """q kᵀ and attention · v for [..., L, E], [..., S, E] and [..., S, V]; a causal mask saves nothing."""
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


# The count from shapes: functions

_TRANSPOSED_FUNCTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_CONV_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, *_TRANSPOSED_FUNCTIONS)


class _Functions(TorchFunctionMode):
    """Counts attention calls, and linear and convolution calls that belong to no layer."""

    def __init__(self, record: Trace) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(func, args, kwargs)
        if self.record.path[-1].kind == "other" and func is F.linear:
            return self._linear(func, args, kwargs)
        if self.record.path[-1].kind == "other" and func in _CONV_FUNCTIONS:
            return self._conv(func, args, kwargs)
        return func(*args, **kwargs)

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        query, key, value = _operands(args, kwargs, "query", "key", "value")
        with self.record.within("attention") as scope, _unpadded(query, value):
            output = func(*args, **kwargs)
        self.record.add(scope, _attention_products(query, key, value))
        return output

    def _linear(self, func: Any, args: Any, kwargs: Any) -> Any:
        _, weight = _operands(args, kwargs, "input", "weight")
        with self.record.within("linear") as scope:
            output = func(*args, **kwargs)
        self.record.add(scope, _linear_products(weight, output))
        return output

    def _conv(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, weight = _operands(args, kwargs, "input", "weight")
        with self.record.within("conv") as scope:
            output = func(*args, **kwargs)
        self.record.add(scope, _conv_products(weight, x, output, func in _TRANSPOSED_FUNCTIONS))
        return output


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    return [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]


def _unpadded(query: Tensor, value: Tensor) -> AbstractContextManager[Any]:
    """Keeps flash kernels off heads that they would pad to 8 channels; padding is no work of the network."""
    fits = query.shape[-1] % 8 == 0 and value.shape[-1] % 8 == 0
    return nullcontext() if fits else sdpa_kernel(SDPBackend.MATH)


# The count at the dispatcher. Releases and devices differ in which of these operations they have.

_LEFT_OPERAND = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm"), 0),
    **dict.fromkeys(("addmm", "addbmm", "baddbmm", "addmv", "_addmm_activation"), 1),
}
_CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable"}
_ATTENTIONS = {
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
}
_COUNTED = {*_LEFT_OPERAND, *_CONVOLUTIONS, *_ATTENTIONS}


class _Dispatcher(TorchDispatchMode):
    """Counts every matrix product, convolution and fused attention that reaches the dispatcher."""

    def __init__(self, record: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name not in _COUNTED:
            return self._uncounted(func, args, kwargs)
        output = func(*args, **kwargs)
        self.record.dispatched[self.record.path[-1]] += _operation_macs(name, args, output)
        return output

    def _uncounted(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Inference mode hands composite operations over whole; their parts come back here one by one.
        with self:
            output = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if output is NotImplemented else output


def _operation_macs(name: str, args: tuple[Any, ...], output: Any) -> int:
    if name in _LEFT_OPERAND:
        left, right = args[_LEFT_OPERAND[name] :][:2]
        return int(left.numel() * (right.shape[-1] if right.dim() > 1 else 1))
    if name in _CONVOLUTIONS:
        x, weight, transposed = args[0], args[1], args[6]
        return int((x if transposed else output).numel() * (weight.numel() // weight.shape[0]))
    query, key, value = args[:3]
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    return int(scores * query.shape[-1] + scores * value.shape[-1])
