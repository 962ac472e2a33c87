"""DeepSpeed without CUDA, for tests alone: Lightning asks for CUDA devices, DeepSpeed itself does not."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy

from lightning_prune.sharding import ZeRO


class ZeroOnCPU(ZeRO):
    """ZeRO over gloo on the CPU.

    Args:
        stage: 1, 2 or 3.
        keep_whole: parameters of fewer elements are kept whole in stage 3; null is DeepSpeed's own threshold, which no
            network of a test reaches.
    """

    def __init__(self, stage: int = 2, keep_whole: int | None = 0) -> None:
        super().__init__(stage, "gloo")
        if keep_whole is not None:
            assert isinstance(self.config, dict)
            self.config["zero_optimization"]["stage3_param_persistence_threshold"] = keep_whole

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        import deepspeed

        # Summing through shared memory would be compiled first, for minutes; gloo sums as well.
        deepspeed.ops.__compatible_ops__ = dict.fromkeys(deepspeed.ops.__compatible_ops__, False)
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
