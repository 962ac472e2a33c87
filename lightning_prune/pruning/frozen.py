"""A network that is used but never trained, saved, averaged or copied."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


class Frozen(Generic[Network]):
    """Holds a network outside the module tree.

    It is no `nn.Module`, so it enters no state dict and no optimizer; copying the module that holds it, as weight
    averaging does, shares it.
    """

    def __init__(self, network: Network) -> None:
        self._network = network.eval().requires_grad_(False)

    def on(self, device: torch.device) -> Network:
        """The network, on `device`."""
        if next(self._network.parameters()).device != device:
            self._network.to(device)
        return self._network

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen[Network]:
        return self
