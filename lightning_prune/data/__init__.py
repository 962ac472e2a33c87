"""Data modules. All draw their batches from one resumable, rank-sharded loader."""

from lightning_prune.data.arrays import ArrayData
from lightning_prune.data.base import DataModule
from lightning_prune.data.fashion import EmbeddedFashion, FashionMNIST

__all__ = ["ArrayData", "DataModule", "EmbeddedFashion", "FashionMNIST"]
