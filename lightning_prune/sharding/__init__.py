"""Training a network that is spread over processes: the strategy, the average, and what to refuse."""

from lightning_prune.sharding.average import ShardedAverage
from lightning_prune.sharding.refusals import check_strategy
from lightning_prune.sharding.strategy import FSDP2

__all__ = ["FSDP2", "ShardedAverage", "check_strategy"]
