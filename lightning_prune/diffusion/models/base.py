"""What every backbone family shares: one signature around a stock network, and a description of its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin
from torch import Tensor, nn

from lightning_prune.blocks import BlockGraph
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.pretrained import build_network
from lightning_prune.diffusion.widths import width_groups
from lightning_prune.protocols import InputError, PrunableUnit, WidthGroup


class Denoiser(nn.Module, ABC):
    """A backbone seen through one signature, `forward(x, t, cond)`, around an untouched network.

    Args:
        weights: where the weights come from: a folder in diffusers layout (a component or a whole pipeline), a hub
            id, a weight file (then `config` is needed too), "embedded:<name>" for a network that ships with the
            package, or null for random initialisation from `config`.
        config: arguments of the network's class; with `weights` given they must agree with the stored ones.
        subfolder: component of a pipeline folder; null takes the one of this family's class.
    """

    network_class: ClassVar[type[nn.Module]]
    timestep_scale: ClassVar[int] = 1
    """What diffusers' pipelines divide a timestep by for this network."""
    sample_shape: tuple[int, ...]
    num_classes: int

    def __init__(
        self, weights: str | None = None, config: dict[str, Any] | None = None, subfolder: str | None = None
    ) -> None:
        super().__init__()
        self.weights = weights
        self.network, self._settings = build_network(self.network_class, weights, config or {}, subfolder)

    @property
    def stored(self) -> Any:
        """The configuration of the network, by attribute; a diffusers class completes it with its defaults."""
        return self.network.config if isinstance(self.network, ConfigMixin) else SimpleNamespace(**self._settings)

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Prediction [B, C, H, W] for noisy `x` [B, C, H, W], timesteps `t` [B] and conditions `cond`."""

    @abstractmethod
    def default_dense(self) -> Sequence[str]:
        """Patterns (regular expressions over module names) of layers that stay dense unless asked for."""

    # Conditions

    def null_condition(self, cond: Condition) -> Condition:
        """The condition that stands for "none", of the shape of `cond`: here the class after the last."""
        assert isinstance(cond, Tensor)
        return torch.full_like(cond, self.num_classes)

    def blank_condition(self, batch: int, device: torch.device | str) -> Condition:
        """A condition of the right shapes and no meaning, for counting: here class 0."""
        return torch.zeros(batch, dtype=torch.long, device=device)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance by this family's rule, here in every channel."""
        return guide_every_channel(conditional, unconditional, scale)

    # Description

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

    def groups(self) -> Sequence[WidthGroup]:
        """Every inner width that can be cut, in definition order."""
        return width_groups(self.network)

    def blocks(self, granularity: str) -> BlockGraph:
        """The blocks that gates skip, at a granularity the family knows.

        Raises:
            InputError: another granularity, or a family that describes no blocks.
        """
        raise InputError(f"granularity: {type(self).__name__} describes no blocks yet")

    def config(self) -> dict[str, Any]:
        """The configuration of the network, enough to build it again."""
        stored = self.network.config if isinstance(self.network, ConfigMixin) else self._settings
        return {k: v for k, v in dict(stored).items() if not k.startswith("_")}

    def arguments(self) -> dict[str, Any]:
        """Further arguments of the constructor that an artifact has to keep."""
        return {}


def guide_every_channel(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """uncond + w (cond - uncond) (Ho and Salimans 2022)."""
    return unconditional + scale * (conditional - unconditional)
