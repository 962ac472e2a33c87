"""Slim networks per stage in one safetensors file; a tensor that stages share is in it once.

Tensors are named `<name>@<version>`. In the manifest every stage lists the versions that are not 0, its number of
sampling steps, and how many units each width group keeps, from which the shapes follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.pretrained import first_difference, read_config, without_weights
from lightning_prune.diffusion.routing import StagedDenoiser
from lightning_prune.protocols import InputError, WidthGroup
from lightning_prune.pruning.masks import effective_weights
from lightning_prune.pruning.structural import Width, slim

FILE = "stages.safetensors"


def write(denoiser: StagedDenoiser, folder: Path) -> dict[str, Any]:
    """Write the tensors into `folder`; returns what the manifest says about the stages."""
    groups = dense_groups(denoiser)
    stored: dict[str, list[Tensor]] = {}
    stages = []
    first = 0
    for network, steps in zip(denoiser.networks, denoiser.lengths, strict=True):
        versions = {}
        masked = effective_weights(network)
        for name, own in network.state_dict(keep_vars=True).items():
            tensor = masked.get(name, own)
            if version := _version(stored.setdefault(name, []), tensor):
                versions[name] = version
        widths = {group.name: kept_units(network, group) for group in groups}
        stages.append({"first": first, "steps": steps, "widths": widths, "versions": versions})
        first += steps
    tensors = {f"{name}@{i}": t.detach().cpu().contiguous() for name, ts in stored.items() for i, t in enumerate(ts)}
    save_file(tensors, folder / FILE)
    return {"stages": stages, "facts": denoiser.facts}


def _version(known: list[Tensor], tensor: Tensor) -> int:
    for version, other in enumerate(known):
        if other is tensor or (other.shape == tensor.shape and torch.equal(other, tensor)):
            return version
    known.append(tensor)
    return len(known) - 1


def dense_groups(denoiser: StagedDenoiser) -> list[WidthGroup]:
    """The width groups of the network that stages were cut from."""
    with without_weights():
        return list(denoiser.family(config=denoiser.config(), **denoiser.arguments()).groups())


def kept_units(network: nn.Module, group: WidthGroup) -> int:
    """Units that a slim network keeps of a group of the dense one."""
    weight = network.get_submodule(group.output).get_parameter("weight")
    return weight.shape[1] // group.channels


def read(family: type[Denoiser], folder: Path, manifest: Mapping[str, Any]) -> StagedDenoiser:
    """The stages of a checked manifest.

    Raises:
        InputError: stages or tensors that do not fit the configuration beside them.
    """
    arguments = manifest["base"].get("arguments", {})
    dense = family(config=read_config(folder / "config.json", family.network_class), **arguments)
    groups = list(dense.groups())
    try:
        # Where networks are built: without weights, that is nowhere.
        home = next(dense.parameters()).device
        tensors = {name: tensor.to(home) for name, tensor in load_file(folder / FILE).items()}
        lengths = [int(stage["steps"]) for stage in manifest["stages"]]
        networks = [_stage(dense.network, groups, stage, tensors, folder) for stage in manifest["stages"]]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / FILE}: does not hold the stages that pruning.json lists: {error}") from error
    dense.weights = manifest["base"].get("weights")
    return StagedDenoiser(dense, networks, lengths, manifest.get("facts"))


def _stage(
    dense: nn.Module, groups: list[WidthGroup], stage: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path
) -> nn.Module:
    kept = stage["widths"]
    widths = {group.name: Width(tuple(range(int(kept[group.name])))) for group in groups}
    network = slim(dense, groups, widths)
    state = {name: f"{name}@{stage['versions'].get(name, 0)}" for name in network.state_dict()}
    if difference := first_difference(
        network.state_dict(), {n: tensors[k] for n, k in state.items()}, "network", "file"
    ):
        raise InputError(f"{folder / FILE}: {difference}")
    for name, key in state.items():
        owner, _, attribute = name.rpartition(".")
        _assign(network.get_submodule(owner), attribute, key, tensors)
    return network


def _assign(owner: nn.Module, attribute: str, key: str, tensors: dict[str, Tensor]) -> None:
    """Put a tensor into a network; further networks that ask for the same key get the same parameter."""
    if attribute in owner._parameters:
        if not isinstance(tensors[key], nn.Parameter):
            tensors[key] = nn.Parameter(tensors[key])
        owner._parameters[attribute] = tensors[key]  # type: ignore[assignment]
    else:
        owner._buffers[attribute] = tensors[key]
