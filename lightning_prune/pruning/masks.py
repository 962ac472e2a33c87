"""Layers that compute with masked weights while their parameters stay dense.

A masked layer is the stock layer with its class swapped: parameter names, state dict and type checks stay those of
the untouched network. The mask acts in the forward pass alone, so it holds under any optimizer and under sharding,
and what is trained, averaged and saved is the dense shadow weight.

Under FSDP2 a weight is spread over processes by rows between calls, and whole within one. Groups lie within rows, so
each process keeps the mask of its own rows, and a call derives that of the whole weight, the same row by row. Stage 3
of DeepSpeed spreads weights in pieces that end anywhere: there no mask is kept, and every call derives its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_prune.protocols import InputError, PrunableUnit, Sparsity
from lightning_prune.pruning.nm import largest, nm_mask, to_groups
from lightning_prune.pruning.shards import full, in_pieces, local, shape

Pattern = Sparsity | str | tuple[int, int] | None  # 2:4, "2:4" or (2, 4); None is dense
Patterns = Pattern | Mapping[str, Pattern]  # for all layers, or by regular expressions over names
Network = TypeVar("Network", bound=nn.Module)
_TINY = 1e-30  # added to magnitudes that are divided by


class _StraightThrough(torch.autograd.Function):
    """Forward W * m, backward the identity: pruned weights keep learning and may return."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class MaskedLayer(nn.Module):
    """What masked layers share: a pattern and the mask it gives for the current weight.

    A frozen mask stays whatever the weight becomes, also when other patterns were in force in between, and what it
    prunes a sparser pattern prunes too; so does one from scores, such as random ones. One from magnitudes may weigh
    columns by a scale, such as a calibrated one.
    """

    weight: Tensor
    _sparsity: Sparsity | None
    _mask: Tensor | None
    _scores: Tensor | None
    _scale: Tensor | None
    _frozen: dict[Sparsity, Tensor]
    _decay: Tensor | None
    _collects_decay: bool

    @property
    def sparsity(self) -> Sparsity | None:
        """The pattern in force; None computes with the dense weight."""
        return self._sparsity

    @property
    def mask(self) -> Tensor | None:
        """1 where a weight is kept, in the dtype of the weight; None while dense, and where the weight is in pieces."""
        return self._mask

    @property
    def follows_weight(self) -> bool:
        """Whether the magnitudes of the weight are all that masks are derived from."""
        return self._scores is None and self._scale is None and not self._frozen

    @property
    def scale(self) -> Tensor | None:
        """Factors of |W| by column that masks are derived with; None is 1."""
        return self._scale

    def set_sparsity(self, sparsity: Sparsity | None) -> None:
        """Change the pattern in place and derive the mask from the scores, or else the current weight."""
        self._sparsity = None if sparsity is None or sparsity.is_dense else sparsity
        self._mask = None
        self.refresh_mask()

    def set_scores(self, scores: Tensor | None) -> None:
        """Derive masks from `scores`, of the weight's shape, instead of magnitudes; None goes back to these."""
        self._scores = scores
        self.refresh_mask()

    def set_scale(self, scale: Tensor | None) -> None:
        """Derive masks from |W| times `scale` [1, I] or [1, I, kh, kw], one factor a column; None is |W| alone."""
        self._scale = scale
        self.refresh_mask()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh_mask()

    def freeze_mask(self) -> None:
        """Keep the present mask for its pattern."""
        if self._sparsity is not None and self._mask is not None:
            self._frozen[self._sparsity] = self._mask.bool()

    def refresh_mask(self) -> None:
        """Derive the mask again, into the tensor it already has where possible."""
        if self._sparsity is None:
            return
        if in_pieces(self.weight):
            self._mask = None
            return
        weight, current = local(self.weight), self._mask
        mask = self.derived_mask(self._sparsity)
        if current is not None and _fits(current, weight):
            current.copy_(mask)
        else:
            self._mask = mask.to(weight.dtype)

    def derived_mask(self, sparsity: Sparsity, weight: Tensor | None = None) -> Tensor:
        """The boolean mask that a pattern has now: frozen, or from the scores, or else from scaled magnitudes."""
        weight = local(self.weight) if weight is None else weight
        if sparsity in self._frozen:
            self._frozen[sparsity] = self._frozen[sparsity].to(weight.device)
            return self._frozen[sparsity]
        if self._scores is None:
            return largest(self._ranked(self._scaled(weight).detach().abs(), sparsity), sparsity)
        self._scores = self._scores.to(weight.device)
        return nm_mask(self._scores, sparsity)

    def _ranked(self, magnitudes: Tensor, sparsity: Sparsity) -> Tensor:
        """Magnitudes, those below 0 that frozen masks of denser patterns prune: what has to go is of these first.

        So along a chain of nested patterns nothing grows back.
        """
        denser = [
            mask.to(magnitudes.device) for frozen, mask in self._frozen.items() if frozen.density > sparsity.density
        ]
        if not denser:
            return magnitudes
        kept = torch.stack(denser).all(dim=0)
        return torch.where(kept, magnitudes, -1 / (magnitudes + _TINY))

    def _scaled(self, weight: Tensor) -> Tensor:
        if self._scale is None:
            return weight
        # Kept where the weight is: a copy at every refresh would make the device wait.
        self._scale = self._scale.to(weight.device)
        return weight.detach() * self._scale

    def effective_weight(self) -> Tensor:
        """The weight this layer computes with.

        Outside a call it is under FSDP2 that of this process' rows; under DeepSpeed's stage 3 it is gathered, which all
        processes do together.
        """
        weight, self._decay = self._weight_in_call(), None
        if self._sparsity is None:
            return weight
        mask = self._mask_of(weight, self._sparsity)
        if self._collects_decay and torch.is_grad_enabled():
            self._decay = 0.5 * ((1 - mask) * weight).square().sum()
        masked: Tensor = _StraightThrough.apply(weight, mask)
        return masked

    def _weight_in_call(self) -> Tensor:
        if in_pieces(self.weight) and self.weight.shape != shape(self.weight):
            return full(self.weight)
        return local(self.weight)

    def _mask_of(self, weight: Tensor, sparsity: Sparsity) -> Tensor:
        mask = self._mask
        if in_pieces(self.weight):
            return self.derived_mask(sparsity, weight).to(weight.dtype)
        if mask is not None and mask.shape != weight.shape and not isinstance(self.weight, DTensor):
            return nm_mask(self._scaled(weight), sparsity).to(weight.dtype)
        if mask is None or mask.shape != weight.shape or mask.device != weight.device:
            self.refresh_mask()
            mask = self._mask
        assert mask is not None
        if mask.dtype != weight.dtype:  # a network turned to half precision keeps the masks it had
            mask = self._mask = mask.to(weight.dtype)
        return mask


def _fits(mask: Tensor, weight: Tensor) -> bool:
    return (mask.device, mask.dtype, mask.shape) == (weight.device, weight.dtype, weight.shape)


class MaskedLinear(MaskedLayer, nn.Linear):
    """`nn.Linear` on masked weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.bias)


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """`nn.Conv2d` on masked weights."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(x, self.effective_weight(), self.bias)
        return output


_MASKED: dict[type[nn.Module], type[MaskedLayer]] = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}


def select_units(
    units: Sequence[PrunableUnit], include: Sequence[str] | None, exclude: Sequence[str], m: int
) -> list[PrunableUnit]:
    """Units whose name fully matches a pattern of `include` (all if None) and none of `exclude`.

    Without `include`, layers whose input dimension is no multiple of m are left out; with it they are an error.

    Raises:
        InputError: a pattern that is no regular expression or matches nothing, a chosen layer that does not
            divide, or no layer left.
    """
    names = [unit.name for unit in units]
    _check_patterns("layers", include or [], names)
    _check_patterns("dense_layers", exclude, names)
    chosen = [unit for unit in units if (include is None or _matches(unit, include)) and not _matches(unit, exclude)]
    fit = [unit for unit in chosen if unit.group_size % m == 0]
    if include is not None and len(fit) < len(chosen):
        unfit = next(unit for unit in chosen if unit.group_size % m)
        raise InputError(f"layers: {unfit.name}: input dimension {unfit.group_size} is no multiple of {m}")
    if not fit:
        raise InputError(f"layers: no layer is left to mask in groups of {m}")
    return fit


def _matches(unit: PrunableUnit, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, unit.name) for pattern in patterns)


def _check_patterns(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            hit = any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise InputError(f"{key}: {pattern!r} is no regular expression: {error}") from error
        if not hit:
            raise InputError(f"{key}: pattern {pattern!r} matches no layer, the first of which is {names[0]!r}")


def _check_divides(layers: Mapping[str, MaskedLayer], sparsity: Sparsity | None) -> None:
    if sparsity is not None and all(fitting(layer, sparsity) is None for layer in layers.values()):
        raise InputError(f"sparsity {sparsity}: the input dimension of no masked layer is a multiple of {sparsity.m}")


def set_patterns(layers: Mapping[str, MaskedLayer], sparsity: Patterns) -> None:
    """Change the pattern of all layers, or of those whose name matches a key of a mapping, in place.

    A layer whose input dimension is no multiple of m computes densely while that pattern is in force.

    Raises:
        InputError: no N:M, a pattern that divides none of its layers, or a key that is no regular expression or matches
            no layer; nothing is changed then.
    """
    for layer, value in _wanted(layers, sparsity):
        layer.set_sparsity(fitting(layer, value))


def parse_pattern(pattern: Pattern) -> Sparsity | None:
    """A pattern as it may be written; None is dense. Raises `InputError` for what is no N:M."""
    return None if pattern is None else Sparsity.parse(pattern)


def _wanted(layers: Mapping[str, MaskedLayer], sparsity: Patterns) -> list[tuple[MaskedLayer, Sparsity | None]]:
    """Layers and what they are to compute under; of several keys that match a layer the last counts."""
    if not isinstance(sparsity, Mapping):
        parsed = parse_pattern(sparsity)
        _check_divides(layers, parsed)
        return [(layer, parsed) for layer in layers.values()]
    _check_patterns("set_sparsity", list(sparsity), list(layers))
    found: list[tuple[MaskedLayer, Sparsity | None]] = []
    for pattern, given in sparsity.items():
        value = parse_pattern(given)
        matched = {name: layer for name, layer in layers.items() if re.fullmatch(pattern, name)}
        _check_divides(matched, value)
        found += [(layer, value) for layer in matched.values()]
    return found


class MaskSet:
    """All masked layers of a network, by qualified name.

    Args:
        network: network whose layers are converted in place; every weight keeps its name.
        units: the units to mask.
        sparsity: the pattern to begin with; None is dense.
    """

    def __init__(self, network: nn.Module, units: Sequence[PrunableUnit], sparsity: Sparsity | None) -> None:
        self.layers: dict[str, MaskedLayer] = {unit.name: _convert(network, unit) for unit in units}
        self.set_sparsity(sparsity)

    def set_sparsity(self, sparsity: Patterns) -> None:
        """Change patterns in place; see `set_patterns`."""
        set_patterns(self.layers, sparsity)

    def check_sparsity(self, sparsity: Patterns) -> None:
        """Raise what `set_sparsity` would, and change nothing."""
        _wanted(self.layers, sparsity)

    def refresh(self) -> None:
        """Derive every mask that is not frozen from the current weights; call after weights changed in place."""
        for layer in self.layers.values():
            layer.refresh_mask()

    def set_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Derive masks from scores by layer instead of from magnitudes."""
        for name, layer in self.layers.items():
            layer.set_scores(scores[name])

    def set_scales(self, scales: Mapping[str, Tensor]) -> None:
        """Weigh the magnitudes that masks are derived from, by layer and column."""
        for name, layer in self.layers.items():
            layer.set_scale(scales[name])

    def freeze(self) -> None:
        """Keep all masks of the present pattern as they are."""
        for layer in self.layers.values():
            layer.freeze_mask()

    @property
    def frozen(self) -> bool:
        """Whether the masks in force stay whatever the weights become."""
        masked = [layer for layer in self.layers.values() if layer.mask is not None]
        return bool(masked) and all(layer.sparsity in layer._frozen for layer in masked)

    def masks(self) -> dict[str, Tensor]:
        """Masks in force by layer, 1 where a weight is kept; layers that compute densely are left out."""
        return {name: layer.mask for name, layer in self.layers.items() if layer.mask is not None}

    def frozen_masks(self) -> dict[str, dict[str, Tensor]]:
        """Frozen masks by layer and pattern, as booleans; they cannot be derived again, so checkpoints hold them."""
        return {name: {str(s): m for s, m in layer._frozen.items()} for name, layer in self.layers.items()}

    def restore(self, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Freeze the masks that `frozen_masks` gave."""
        for name, layer in self.layers.items():
            layer._frozen = {Sparsity.parse(pattern): mask for pattern, mask in masks[name].items()}
            layer.refresh_mask()

    @torch.no_grad()
    def flips(self) -> dict[str, float]:
        """Fraction of each mask that the present weights would change: what the next `refresh` flips.

        Of a network that is spread over processes, this process' rows.
        """
        masks, layers = self.masks(), self.layers.items()
        now = {n: layer.derived_mask(layer.sparsity) for n, layer in layers if layer.sparsity and n in masks}
        return flip_rates(masks, now)

    @torch.no_grad()
    def derived(self, sparsity: Sparsity) -> dict[str, Tensor]:
        """The masks that the present weights have under a pattern, whatever is in force, by layer.

        Layers that it does not divide are left out, and those whose weights are in pieces.
        """
        layers = {name: layer for name, layer in self.layers.items() if not in_pieces(layer.weight)}
        return {name: layer.derived_mask(sparsity) for name, layer in layers.items() if fitting(layer, sparsity)}

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights, so that they stay where they are."""
        for layer in self.layers.values():
            if layer.weight.grad is not None and layer.mask is not None:
                local(layer.weight.grad).mul_(layer.mask)

    @torch.no_grad()
    def density_by_layer(self) -> dict[str, float]:
        """Fraction of non-zero effective weights by layer; all processes call it together."""
        counts = torch.stack([(layer.effective_weight() != 0).sum() for layer in self.layers.values()])
        totals = self._over_shards(counts).tolist()
        return {
            n: total / shape(layer.weight).numel()
            for (n, layer), total in zip(self.layers.items(), totals, strict=True)
        }

    @torch.no_grad()
    def violations(self, compare: bool = False) -> int:
        """Groups of the weights computed with whose number of kept entries is not n, or of which more are non-zero.

        With `compare`, groups whose mask is not that of the present weight count too: masks of other weights.
        Under FSDP2 all processes call it together, and each gets the sum over all rows.
        """
        found = [_violations(layer, compare) for layer in self.layers.values() if layer.sparsity is not None]
        # Counted on the device, which is waited for once.
        return int(self._over_shards(torch.stack(found).sum() if found else torch.tensor(0)))

    def _over_shards(self, counts: Tensor) -> Tensor:
        """Counts of this process' rows, summed over the processes that hold the others."""
        weights = [layer.weight for layer in self.layers.values() if isinstance(layer.weight, DTensor)]
        if not weights:
            return counts
        summed = counts.to(weights[0].device)
        distributed.all_reduce(summed, group=weights[0].device_mesh.get_group())
        return summed

    def collect_decay(self) -> None:
        """Let calls note the term whose gradient is (1 - m) * W, for engines that hold gradients out of reach."""
        for layer in self.layers.values():
            layer._collects_decay = True

    def collected_decay(self) -> Tensor | float:
        """1/2 |(1 - m) * W|^2, summed over layers called since this was last asked; of each the last call counts."""
        total: Tensor | float = 0.0
        for layer in self.layers.values():
            total, layer._decay = total if layer._decay is None else total + layer._decay, None
        return total

    @torch.no_grad()
    def add_decay(self, strength: float) -> None:
        """Add strength * (1 - m) * W to the gradients (SR-STE, Zhou et al. 2021, equation 10).

        Call it on unscaled gradients, once per optimizer step: under loss scaling a term added in backward is
        divided away.
        """
        for layer in self.layers.values():
            if layer.weight.grad is not None and layer.mask is not None:
                local(layer.weight.grad).add_(local(layer.weight) * (1 - layer.mask), alpha=strength)


def flip_rates(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """Fraction of the entries that differ between masks, by layer; the device is waited for once."""
    found = {}
    for name, mask in before.items():
        # A network that was spread or moved just now still has the masks it had before.
        if now[name].shape == mask.shape:
            found[name] = (now[name] != mask.to(now[name].device).bool()).float().mean()
    rates = torch.stack(list(found.values())).tolist() if found else []
    return dict(zip(found, rates, strict=True))


def maskable_layers(network: nn.Module) -> dict[str, MaskedLayer]:
    """Layers of `network` that can compute under a mask, whether or not they do now, by qualified name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, MaskedLayer)}


def masked_layers(network: nn.Module) -> dict[str, MaskedLayer]:
    """Layers of `network` that compute under a mask now, by qualified name."""
    return {name: layer for name, layer in maskable_layers(network).items() if layer.sparsity is not None}


def patterns_now(network: nn.Module) -> dict[str, Sparsity]:
    """What layers of `network` are masked by now, by qualified name."""
    return {name: layer.sparsity for name, layer in maskable_layers(network).items() if layer.sparsity is not None}


def check_unmasked(network: nn.Module) -> None:
    """Raise `InputError` for a network that has masks already, as one of a switchable artifact."""
    if masked := maskable_layers(network):
        raise InputError(
            f"model.denoiser: {len(masked)} of its layers have masks already; go on from the checkpoint of that run, "
            "or begin with its artifact in the format dense"
        )


@torch.no_grad()
def effective_weights(network: nn.Module) -> dict[str, Tensor]:
    """Weights of layers under a mask as `network` computes with them, by their names in its state dict."""
    return {f"{name}.weight": layer.effective_weight() for name, layer in masked_layers(network).items()}


@torch.no_grad()
def effective_state(network: nn.Module) -> dict[str, Tensor]:
    """State dict of `network` with every masked weight as the network computes with it: zeros written out."""
    masked = effective_weights(network)
    return {name: masked.get(name, tensor).detach().clone() for name, tensor in network.state_dict().items()}


@torch.no_grad()
def baked(network: Network) -> Network:
    """A copy whose weights hold their zeros and whose layers are plain, without gradients.

    Tensors that no mask changes are the network's own, so of a network without masks nothing is copied.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    for layer in network.modules():
        if isinstance(layer, MaskedLayer) and layer.sparsity is not None:
            memo[id(layer.weight)] = nn.Parameter(layer.effective_weight().detach(), requires_grad=False)
            # What masks are derived from stays behind.
            memo |= {id(layer._mask): None, id(layer._scores): None, id(layer._scale): None, id(layer._frozen): {}}
    copy = deepcopy(network, memo)
    for layer in copy.modules():
        if isinstance(layer, MaskedLayer):
            layer.set_sparsity(None)
    return copy


def _convert(network: nn.Module, unit: PrunableUnit) -> MaskedLayer:
    layer = network.get_submodule(unit.name)
    if isinstance(layer, MaskedLayer):
        return layer
    if type(layer) not in _MASKED:
        raise InputError(f"layers: {unit.name} is a {type(layer).__name__}; only Linear and Conv2d can be masked")
    layer.__class__ = _MASKED[type(layer)]
    assert isinstance(layer, MaskedLayer)
    layer._sparsity, layer._mask, layer._scores, layer._scale, layer._frozen = None, None, None, None, {}
    layer._decay, layer._collects_decay = None, False
    return layer


def fitting(layer: MaskedLayer, sparsity: Sparsity | None) -> Sparsity | None:
    """The pattern, or None where it does not divide the layer's inputs."""
    return None if sparsity is None or shape(layer.weight)[1] % sparsity.m else sparsity


def _violations(layer: MaskedLayer, compare: bool) -> Tensor:
    sparsity = layer.sparsity
    assert sparsity is not None
    weight = layer.effective_weight()
    mask = layer.mask if layer.mask is not None else layer.derived_mask(sparsity, weight)
    kept = to_groups(mask, sparsity.m).sum(dim=-1)
    nonzero = (to_groups(weight, sparsity.m) != 0).sum(dim=-1)
    broken = (kept != sparsity.n) | (nonzero > sparsity.n)
    if compare and layer.mask is not None:
        derived = layer.derived_mask(sparsity).to(mask.dtype)
        broken |= (to_groups(derived, sparsity.m) != to_groups(mask, sparsity.m)).any(dim=-1)
    return broken.sum()
