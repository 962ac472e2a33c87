"""One file per backbone family. A file loads its networks and describes their anatomy; nothing else knows them."""

from lightning_prune.diffusion.models.base import Denoiser
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.unet2d import UNet2D

__all__ = ["Denoiser", "DiT", "UNet2D"]
