"""The cost ledger: multiply-accumulates of one network call, by layer, in three conventions.

* `linear`: the products of convolutions and linear layers alone.
* `module`: those with their biases (a linear bias once per call, a convolution's at every position) and, for
  every element of a norm, 2 with a learned scale and 1 without; no attention products. Published figures of
  Stable Diffusion are of this kind.
* `aten`: convolutions, matrix products and attention (q kᵀ and attention · v); no biases, no norms. The
  default, and the one all budgets use.

A count reads the shapes of layers and is refused unless the dispatcher saw exactly the same products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.metrics.macs_trace import Kind, Scope, Trace, layer_kind, trace
from lightning_prune.protocols import InputError, Sparsity

Convention = Literal["linear", "module", "aten"]
Sparsities = Mapping[str, Sparsity]
Number = TypeVar("Number", int, Fraction)

_KINDS_COUNTED: Mapping[str, set[Kind]] = {
    "linear": {"linear", "conv"},
    "module": {"linear", "conv", "norm"},
    "aten": {"linear", "conv", "attention", "other"},
}


class MacsMismatchError(RuntimeError):
    """The count from shapes and the count at the dispatcher disagree, so neither is to be trusted."""


@dataclass(frozen=True)
class LayerMacs:
    """One line of the ledger: what one layer, or the attention of one module, does in one network call.

    Attributes:
        layer: qualified name of the module.
        kind: "linear", "conv", "attention", "norm", or "other": products outside layers and attention calls.
        calls: how often it ran; 0 for a layer the call does not reach. Always 0 for "other".
        products: multiply-accumulates.
        elementwise: operations on biases and norms, which `module` counts on top.
    """

    layer: str
    kind: Kind
    calls: int
    products: int
    elementwise: int

    def macs(self, convention: Convention = "aten") -> int:
        if self.kind not in _KINDS_COUNTED[convention]:
            return 0
        return self.products + (self.elementwise if convention == "module" else 0)


@dataclass(frozen=True)
class Ledger:
    """Multiply-accumulates of one call of a network, by layer, in definition order.

    `sparsities` maps names of linear and convolution layers to their N:M pattern; layers left out, and those
    with a dense pattern, are not masked. An unknown name or convention raises `InputError`.
    """

    rows: tuple[LayerMacs, ...]
    parameters: int

    def macs(self, convention: Convention = "aten") -> int:
        """MACs of the dense network."""
        return sum(row.macs(convention) for row in self._counted(convention))

    def by_kind(self, convention: Convention = "aten") -> dict[Kind, int]:
        """MACs by kind of work; every kind the convention counts is there."""
        rows = self._counted(convention)
        kinds = [kind for kind in get_args(Kind) if kind in _KINDS_COUNTED[convention]]
        return {kind: sum(row.macs(convention) for row in rows if row.kind == kind) for kind in kinds}

    def by_layer(self, convention: Convention = "aten") -> dict[str, int]:
        """MACs by qualified name."""
        layers: dict[str, int] = {}
        for row in self._counted(convention):
            layers[row.layer] = layers.get(row.layer, 0) + row.macs(convention)
        return layers

    def inside(self, module: str, convention: Convention = "aten") -> int:
        """MACs of a module and everything in it. Raises `InputError` if nothing in it was counted."""
        rows = [r for r in self._counted(convention) if f"{r.layer}.".startswith(f"{module}.") or not module]
        if not rows:
            raise InputError(f"macs: {module}: no layer of the network is in there")
        return sum(row.macs(convention) for row in rows)

    def kept(self, sparsities: Sparsities, convention: Convention = "aten") -> Fraction:
        """MACs left under masks: exactly n/m of the products of masked layers, everything else in full."""
        removed = [Fraction(s.m - s.n, s.m) * row.products for row, s in self._masked(sparsities, convention)]
        return self.macs(convention) - sum(removed, Fraction(0))

    def kept_share(self, sparsities: Sparsities, convention: Convention = "aten") -> Fraction:
        """Kept MACs over those of the dense network, in (0, 1]."""
        return self.kept(sparsities, convention) / self.macs(convention)

    def masked(self, sparsities: Sparsities, convention: Convention = "aten") -> int:
        """MACs, counted dense, of the layers under a mask."""
        return sum(row.macs(convention) for row, _ in self._masked(sparsities, convention))

    def masked_share(self, sparsities: Sparsities, convention: Convention = "aten") -> Fraction:
        """MACs of the layers under a mask over those of the network, in [0, 1]."""
        return Fraction(self.masked(sparsities, convention), self.macs(convention))

    def accelerable(self, sparsities: Sparsities, convention: Convention = "aten") -> int:
        """MACs, counted dense, of linear layers that are 2:4 or sparser, which kernels exist for; no claim of speed."""
        rows = [row for row, sparsity in self._masked(sparsities, convention) if sparsity.is_within_2to4]
        return sum(row.macs(convention) for row in rows if row.kind == "linear")

    def _counted(self, convention: Convention) -> list[LayerMacs]:
        if convention not in _KINDS_COUNTED:
            raise InputError(f"macs: convention {convention!r} is none of {', '.join(_KINDS_COUNTED)}")
        return [row for row in self.rows if row.kind in _KINDS_COUNTED[convention]]

    def _masked(self, sparsities: Sparsities, convention: Convention) -> list[tuple[LayerMacs, Sparsity]]:
        weighted = [row for row in self._counted(convention) if row.kind in ("linear", "conv")]
        for name in sparsities.keys() - {row.layer for row in weighted}:
            raise InputError(f"macs: {name}: no linear or convolution layer of that name")
        patterns = [(row, sparsities[row.layer]) for row in weighted if row.layer in sparsities]
        return [(row, sparsity) for row, sparsity in patterns if not sparsity.is_dense]


def macs_per_image(call: Number, steps: int, guidance: float = 1.0) -> Number:
    """MACs of one image from those of one call.

    Guidance of any scale but 1 makes two predictions a step, in one doubled batch or in turn.
    """
    if steps < 1:
        raise InputError(f"macs: {steps} sampling steps; an image takes at least one")
    return call * steps * (1 if guidance == 1.0 else 2)


def count(network: nn.Module, *args: Any, **kwargs: Any) -> Ledger:
    """Count one call `network(*args, **kwargs)`, in evaluation mode and without gradients.

    Nothing is moved: with the network and its inputs on the meta device nothing is computed either. Work done
    outside torch's own operations, such as a custom attention kernel, is not seen.

    Raises:
        MacsMismatchError: the two counts disagree; the message names the layer.
    """
    with _evaluating(network):
        return ledger_of(network, trace(network, lambda: network(*args, **kwargs)))


def count_denoiser(denoiser: Denoiser) -> Ledger:
    """Count one prediction for one image, without guidance, on the device that the denoiser is on.

    Layers are named as in its anatomy. A masked layer counts as its dense self.

    Raises:
        MacsMismatchError: the two counts disagree; the message names the layer.
    """
    weight = next(p for p in denoiser.network.parameters() if p.is_floating_point())
    x = torch.zeros(1, *denoiser.sample_shape, device=weight.device, dtype=weight.dtype)
    t = torch.zeros(1, device=weight.device, dtype=torch.long)
    cond = denoiser.blank_condition(1, weight.device)
    with _evaluating(denoiser):
        return ledger_of(denoiser.network, trace(denoiser.network, lambda: denoiser(x, t, cond)))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is back in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def ledger_of(network: nn.Module, record: Trace) -> Ledger:
    """The ledger of a traced call. Raises `MacsMismatchError` when the two counts in the trace disagree."""
    _reconcile(record)
    names = {name: i for i, (name, _) in enumerate(network.named_modules())}
    weighted = [(n, m) for n, m in network.named_modules() if layer_kind(m) in ("linear", "conv")]
    idle = {Scope(name, layer_kind(module)) for name, module in weighted}
    scopes = idle | set(record.calls) | set(record.dispatched)
    rows = [_row(record, scope) for scope in sorted(scopes, key=lambda s: (names[s.layer], s.kind))]
    return Ledger(tuple(rows), sum(p.numel() for p in network.parameters()))


def _row(record: Trace, scope: Scope) -> LayerMacs:
    products = record.dispatched[scope] if scope.kind == "other" else record.products[scope]
    return LayerMacs(*scope, record.calls[scope], products, record.elementwise[scope])


def _reconcile(record: Trace) -> None:
    for scope in record.products.keys() | record.dispatched.keys():
        shapes, dispatched = record.products[scope], record.dispatched[scope]
        # Products outside layers and attention calls have no formula to be checked against.
        if scope.kind != "other" and shapes != dispatched:
            name = f"{scope.layer or 'network'} ({scope.kind})"
            raise MacsMismatchError(f"macs: {name}: {shapes} by its shapes, {dispatched} dispatched")


@dataclass(frozen=True)
class WeightStatistics:
    """Size of a module's parameters as they are stored, each shared one once.

    Attributes:
        parameters: number of parameters.
        nonzero: those that are not zero. Masks outside the weights are not applied: fold them in first.
        bytes: dense storage in their present type.
    """

    parameters: int
    nonzero: int
    bytes: int


def weight_statistics(module: nn.Module) -> WeightStatistics:
    """Size of a module's weights. Raises `InputError` on the meta device, which has no values to count."""
    parameters = list(module.parameters())
    if any(p.is_meta for p in parameters):
        raise InputError("macs: weights on the meta device have no values to count")
    return WeightStatistics(
        parameters=sum(p.numel() for p in parameters),
        nonzero=sum(int(torch.count_nonzero(p)) for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
    )
