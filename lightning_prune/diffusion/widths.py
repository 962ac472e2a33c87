"""The inner widths of diffusers' building blocks: what can be cut without changing what goes in or out of a block.

* attention: a head is rows of the query, key and value projections and columns of the output projection.
* feed-forward: a channel is a row of the first projection, or two of a gated one, and a column of the second.
* ResNet block: channels between its convolutions, whole groups of the norm between them, so that the statistics of the
  groups that stay do not change.
"""

from __future__ import annotations

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from lightning_prune.protocols import WidthCut, WidthGroup


def width_groups(network: nn.Module) -> list[WidthGroup]:
    """Every inner width with at least two units, in definition order."""
    found = (_group(name, module) for name, module in network.named_modules())
    return [group for group in found if group is not None and group.units > 1]


def _group(name: str, module: nn.Module) -> WidthGroup | None:
    if isinstance(module, Attention):
        return _heads(name, module)
    if isinstance(module, FeedForward):
        return _feed_forward(name, module)
    if isinstance(module, ResnetBlock2D):
        return _resnet(name, module)
    return None


def _heads(name: str, attention: Attention) -> WidthGroup | None:
    if not _separable(attention):
        return None
    cuts = [cut for part in ("to_q", "to_k", "to_v") for cut in _rows(f"{name}.{part}", getattr(attention, part))]
    output = f"{name}.to_out.0"
    width = attention.to_out[0].in_features // attention.heads
    return WidthGroup(name, "heads", output, attention.heads, width, 1, (*cuts, WidthCut(f"{output}.weight", 1)))


def _separable(attention: Attention) -> bool:
    """Whether a head is rows and columns of its own: no joint attention, no shared keys, no norm across heads."""
    if attention.to_out is None or attention.added_kv_proj_dim is not None or attention.to_k is None:
        return False
    widths = {layer.out_features for layer in (attention.to_q, attention.to_k, attention.to_v)}
    if widths != {attention.to_out[0].in_features} or attention.fused_projections:
        return False
    sizes = {p.numel() for norm in (attention.norm_q, attention.norm_k) if norm is not None for p in norm.parameters()}
    return sizes <= {attention.to_out[0].in_features // attention.heads}


def _feed_forward(name: str, block: FeedForward) -> WidthGroup | None:
    first, last = block.net[0], block.net[2]
    if not isinstance(getattr(first, "proj", None), nn.Linear) or not isinstance(last, nn.Linear):
        return None
    channels, output = last.in_features, f"{name}.net.2"
    cuts = _rows(f"{name}.net.0.proj", first.proj, first.proj.out_features // channels)
    return WidthGroup(name, "channels", output, channels, 1, 1, (*cuts, WidthCut(f"{output}.weight", 1)))


def _resnet(name: str, block: ResnetBlock2D) -> WidthGroup | None:
    norm, output = block.norm2, f"{name}.conv2"
    if not isinstance(norm, nn.GroupNorm) or block.conv2.groups != 1:
        return None
    cuts = [*_rows(f"{name}.conv1", block.conv1), *_rows(f"{name}.norm2", norm)]
    if block.time_emb_proj is not None:
        repeats = block.time_emb_proj.out_features // norm.num_channels
        cuts += _rows(f"{name}.time_emb_proj", block.time_emb_proj, repeats)
    taps = block.conv2.kernel_size[0] * block.conv2.kernel_size[1]
    size = norm.num_channels // norm.num_groups
    cuts.append(WidthCut(f"{output}.weight", 1))
    return WidthGroup(name, "norm-groups", output, norm.num_groups, size, taps, tuple(cuts))


def _rows(name: str, layer: nn.Module, repeats: int = 1) -> list[WidthCut]:
    """Every parameter of a layer along its outputs."""
    return [WidthCut(f"{name}.{parameter}", 0, repeats) for parameter, _ in layer.named_parameters()]
