"""FSDP2 as a strategy of the trainer: `trainer.strategy: fsdp2`."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry


class FSDP2(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with parameters, gradients and optimizer states spread over all processes.

    Checkpoints are the one file that every other strategy reads and writes; a folder of shards is written in place,
    so that a job killed meanwhile would have nothing to go on from.

    Args:
        process_group_backend: "nccl", "gloo" or null for what fits the device.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        # The hook in which Lightning wants parameters sharded. A method of the module would be overridden for every
        # strategy, which Lightning's own weight averaging warns of.
        module: Any = self.lightning_module
        module.configure_model = partial(_shard, module)

    def teardown(self) -> None:
        module: Any = self.lightning_module
        if module is not None:
            vars(module).pop("configure_model", None)
        super().teardown()


def _shard(module: pl.LightningModule) -> None:
    module.shard(module.device_mesh["data_parallel"])  # type: ignore[index, operator]


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2, description=FSDP2.__doc__)
