"""Dense training: the reference every method is compared with."""

from lightning_prune.methods.dense.module import Dense

__all__ = ["Dense"]
