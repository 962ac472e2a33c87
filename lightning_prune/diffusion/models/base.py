"""What every backbone family shares: loading a stock diffusers network and describing its layers."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_prune.blocks import BlockGraph
from lightning_prune.checksums import sha256
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.protocols import InputError, PrunableUnit

EMBEDDED = "embedded:"
_ASSETS = Path(__file__).parents[2] / "assets"
_WEIGHT_FILE = "diffusion_pytorch_model.safetensors"


class Denoiser(nn.Module, ABC):
    """A backbone seen through one signature, `forward(x, t, cond)`, around an untouched diffusers network.

    Args:
        weights: where the weights come from: a folder in diffusers layout, a hub id, "embedded:<name>" for a
            network that ships with the package, or null for random initialisation from `config`.
        config: arguments of the diffusers class; with `weights` given they must agree with the stored ones.
        subfolder: component of a pipeline folder, for example "transformer".
    """

    network_class: ClassVar[type[ModelMixin]]
    sample_shape: tuple[int, ...]
    num_classes: int

    def __init__(
        self, weights: str | None = None, config: dict[str, Any] | None = None, subfolder: str | None = None
    ) -> None:
        super().__init__()
        self.weights = weights
        self.network = build_network(self.network_class, weights, config or {}, subfolder)

    @property
    def stored(self) -> Any:
        """The configuration that diffusers keeps with the network."""
        return self.network.config

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Prediction [B, C, H, W] for noisy `x` [B, C, H, W], timesteps `t` [B] and conditions such as labels [B]."""

    @abstractmethod
    def default_dense(self) -> Sequence[str]:
        """Patterns (regular expressions over module names) of layers that stay dense unless asked for."""

    def null_condition(self, cond: Condition) -> Condition:
        """The condition that stands for "no class" or "no text", of the shape of `cond`."""
        return torch.full_like(cond, self.num_classes)

    def anatomy(self) -> Sequence[PrunableUnit]:
        """Every Linear and Conv2d of the network as a unit fit for N:M, in definition order."""
        return [
            PrunableUnit(
                name=name,
                kind="linear" if isinstance(layer, nn.Linear) else "conv",
                parameters=(f"{name}.weight",),
                group_size=layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels // layer.groups,
            )
            for name, layer in self.network.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        ]

    def blocks(self, granularity: str) -> BlockGraph:
        """The blocks that gates skip, at a granularity the family knows.

        Raises:
            InputError: another granularity, or a family that describes no blocks.
        """
        raise InputError(f"granularity: {type(self).__name__} describes no blocks yet")

    def config(self) -> dict[str, Any]:
        """The diffusers configuration of the network, enough to build it again."""
        return {k: v for k, v in dict(self.stored).items() if not k.startswith("_")}


def build_network(
    cls: type[ModelMixin], weights: str | None, config: Mapping[str, Any], subfolder: str | None
) -> nn.Module:
    """Build `cls` from `config` (random) or from `weights`.

    Raises:
        InputError: no source at all, a folder that does not hold such a network, tensors of another shape.
    """
    if weights is None:
        if not config:
            raise InputError("denoiser: give `weights` (a path, a hub id or embedded:<name>) or a `config`")
        return _from_config(cls, config)
    folder = _ASSETS / weights.removeprefix(EMBEDDED) if weights.startswith(EMBEDDED) else Path(weights)
    if not folder.exists():
        if weights.startswith(EMBEDDED) or not re.fullmatch(r"[\w.-]+/[\w.-]+", weights):
            raise InputError(f"denoiser.weights: {weights}: no such folder")
        return _from_hub(cls, weights, subfolder)
    return _from_folder(cls, folder / subfolder if subfolder else folder, config)


def _from_config(cls: type[ModelMixin], config: Mapping[str, Any]) -> nn.Module:
    try:
        network: nn.Module = cls(**config)
    except (TypeError, ValueError) as error:
        raise InputError(f"denoiser.config: {cls.__name__}: {error}") from error
    return network


def _from_hub(cls: type[ModelMixin], weights: str, subfolder: str | None) -> nn.Module:
    try:
        network: nn.Module = cls.from_pretrained(weights, subfolder=subfolder, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"denoiser.weights: {weights}: neither a folder nor reachable on the hub") from error
    return network


def _from_folder(cls: type[ModelMixin], folder: Path, config: Mapping[str, Any]) -> nn.Module:
    stored = read_config(folder / "config.json", cls)
    for key, value in config.items():
        if key in stored and stored[key] != value:
            raise InputError(f"denoiser.config.{key}: {value} asked for, {stored[key]} in {folder / 'config.json'}")
    network = _from_config(cls, {**stored, **config})
    _check_manifest(folder)
    load_weights(network, folder / _WEIGHT_FILE)
    return network


def _check_manifest(folder: Path) -> None:
    """Compare the weights with their checksum where the folder is an artefact of ours."""
    manifest, weights = folder / "pruning.json", folder / _WEIGHT_FILE
    if not manifest.exists():
        return
    expected = json.loads(manifest.read_text()).get("files", {}).get(_WEIGHT_FILE)
    if not weights.exists() or sha256(weights) != expected:
        raise InputError(f"{weights}: missing, or its checksum differs from pruning.json")


def read_config(file: Path, cls: type[ModelMixin]) -> dict[str, Any]:
    """Read a diffusers `config.json` and check that it belongs to `cls`."""
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as a diffusers configuration") from error
    if content.get("_class_name", cls.__name__) != cls.__name__:
        raise InputError(f"{file}: holds a {content['_class_name']}, expected {cls.__name__}")
    return {k: v for k, v in content.items() if not k.startswith("_")}


def first_difference(
    own: Mapping[str, Tensor], other: Mapping[str, Tensor], own_name: str, other_name: str
) -> str | None:
    """What keeps `other` from being loaded into `own`, in words; None if every tensor has its counterpart."""
    for name in [*own, *other]:
        if name not in own or name not in other:
            return f"tensor {name} has no counterpart in the {own_name if name not in own else other_name}"
        if own[name].shape != other[name].shape:
            return f"{name} has shape {list(other[name].shape)}, expected {list(own[name].shape)}"
    return None


def load_weights(network: nn.Module, file: Path) -> None:
    """Load a safetensors file strictly into `network`, naming the first tensor that does not fit."""
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: missing or damaged weight file") from error
    if difference := first_difference(network.state_dict(), state, "network", "file"):
        raise InputError(f"{file}: {difference}")
    network.load_state_dict(state)
