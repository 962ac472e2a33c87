"""Parts of a network that need not be computed again, because only what comes after them has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prune.pruning.spill import Place, Spill


class Replay:
    """Outputs of modules by batch of samples, given again for as long as nothing before them changes.

    Layers of a network are then changed one after the other, and measured after each change, at a cost that is linear
    in their number.

    Args:
        network: the network.
        names: qualified names of modules that are called once in a call of the network and give a tensor; none is
            part of another.
        folder: where to keep outputs in a file; null keeps them in memory.
    """

    def __init__(self, network: nn.Module, names: Iterable[str], folder: Path | None = None) -> None:
        self._modules = {name: network.get_submodule(name) for name in names}
        self._spill = Spill(folder)
        self._outputs: dict[tuple[str, Hashable], Place] = {}

    @contextmanager
    def until(self, changed: str, batch: Hashable) -> Iterator[None]:
        """For one call of the network without gradients, in which the module `changed` and all behind it compute.

        Args:
            changed: name of the first module that may have changed since the batch was last seen.
            batch: what tells the samples of the call from others.
        """
        reached = False

        def answer(name: str, compute: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            nonlocal reached
            reached = reached or name == changed
            if reached:
                return compute(*args, **kwargs)
            if (name, batch) in self._outputs:
                return self._spill.get(self._outputs[name, batch])
            output = compute(*args, **kwargs)
            if output.device.type == "cpu":  # an accelerator computes it again sooner than it is fetched
                self._outputs[name, batch] = self._spill.put(output)
            return output

        for name, module in self._modules.items():
            module.forward = partial(answer, name, module.forward)
        try:
            yield
        finally:
            for module in self._modules.values():
                del module.forward
