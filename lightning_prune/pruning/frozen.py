"""Things that copying the module which holds them, as weight averaging does, shares instead."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import nn

Value = TypeVar("Value")
Network = TypeVar("Network", bound=nn.Module)


class Shared(Generic[Value]):
    """Holds a value that a copy of the holder shares."""

    def __init__(self, value: Value) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared[Value]:
        return self


class Frozen(Shared[Network]):
    """A network that is used but never trained, saved, averaged or copied.

    It is no `nn.Module`, so it enters no state dict and no optimizer.
    """

    def __init__(self, network: Network) -> None:
        super().__init__(network.eval().requires_grad_(False))

    def on(self, device: torch.device) -> Network:
        """The network, on `device`."""
        if next(self.value.parameters()).device != device:
            self.value.to(device)
        return self.value
