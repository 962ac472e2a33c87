"""LPIPS (Zhang et al. 2018) on AlexNet: how far two images are apart to a network trained to agree with people.

torchmetrics brings the linear layers and the arithmetic; the AlexNet beneath them it would download, so its weights
are a local file here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS

from lightning_prune.metrics.extractors.base import to_rgb
from lightning_prune.protocols import InputError


class Lpips(nn.Module):
    """LPIPS of pairs of images.

    Args:
        weights: torchvision's AlexNet, trained on ImageNet: safetensors, or a state dict saved by torch.

    Raises:
        InputError: the file is missing, unreadable, or holds another network.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.network = _LPIPS(net="alex", pnet_rand=True).eval().requires_grad_(False)
        given = _read(Path(weights))
        try:
            # Slices keep torchvision's numbers: slice3.6.weight is features.6.weight.
            named = {name: given[f"features.{name.split('.', 1)[1]}"] for name in self.network.net.state_dict()}
            self.network.net.load_state_dict(named)
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{weights}: not the weights of torchvision's AlexNet") from error

    @torch.no_grad()
    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distances [N] of `images` and `others`, [N, 1 or 3, H, W] in [-1, 1]; values outside are clipped."""
        found: Tensor = self.network(to_rgb(images.clamp(-1, 1)), to_rgb(others.clamp(-1, 1)))
        return found.flatten()


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: missing, or cannot be read as weights") from error
    except Exception as error:  # torch.load has no error of its own
        raise InputError(f"{file}: cannot be read as weights") from error
    return state
