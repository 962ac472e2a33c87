"""What a device would be waited for: numbers that are read, and tensors that change devices."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts numbers read one by one, and copies between devices, while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads, self.copies = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.reads += name == "_local_scalar_dense"
        if name == "_to_copy" and isinstance(output, Tensor):
            self.copies += output.device != args[0].device
        return output
