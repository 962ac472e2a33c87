"""Training a network that is spread over processes: the strategy, the average, and what to refuse."""

from lightning_prune.sharding.average import ShardedAverage, WeightAverage
from lightning_prune.sharding.refusals import check_precision, check_strategy
from lightning_prune.sharding.strategy import FSDP2
from lightning_prune.sharding.zero import ZeRO, check_optimizer

__all__ = ["FSDP2", "ShardedAverage", "WeightAverage", "ZeRO", "check_optimizer", "check_precision", "check_strategy"]
