"""Data modules. All draw their batches from one resumable, rank-sharded loader."""

from lightning_prune.data.arrays import ArrayData
from lightning_prune.data.base import DataModule
from lightning_prune.data.cifar import CIFAR10
from lightning_prune.data.fashion import EmbeddedFashion, FashionMNIST
from lightning_prune.data.folder import ImageFolder
from lightning_prune.data.hugging_face import HuggingFaceData
from lightning_prune.data.latents import CachedLatents
from lightning_prune.data.picture_data import PictureData
from lightning_prune.data.torchvision_data import TorchvisionData

__all__ = [
    "CIFAR10",
    "ArrayData",
    "CachedLatents",
    "DataModule",
    "EmbeddedFashion",
    "FashionMNIST",
    "HuggingFaceData",
    "ImageFolder",
    "PictureData",
    "TorchvisionData",
]
