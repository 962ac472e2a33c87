"""Pooled features of any timm network, under a name of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_prune.metrics.extractors.base import Extracted, NetworkExtractor, tensors_sha256, to_rgb
from lightning_prune.protocols import InputError


class TimmExtractor(NetworkExtractor):
    """Pooled features of the timm network `architecture`, with its input size, interpolation, mean and deviation.

    The whole image is resized, without the centre crop that classifiers are evaluated with: a generated border counts.

    Args:
        architecture: timm's name of the network, for example "tf_efficientnet_lite0".
        weights: safetensors file with timm's names, or a folder with `model.safetensors`.
        batch_size: images that go through the network at once.

    Raises:
        InputError: no such network; weights missing, unreadable or of another network.
    """

    def __init__(self, architecture: str, weights: str | Path | None, batch_size: int = 50) -> None:
        if not timm.is_model(architecture):
            raise InputError(f"extractor timm/{architecture}: timm {timm.__version__} has no such network")
        if weights is None:
            raise InputError(f"extractor timm/{architecture}: give its weights, a safetensors file or folder")
        network: Any = timm.create_model(architecture, pretrained=False, num_classes=0)
        load_weights(network, Path(weights))
        super().__init__(network, batch_size)
        config = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
        self._mode = config["interpolation"]
        if self._mode not in ("bilinear", "bicubic"):
            raise InputError(f"extractor timm/{architecture}: {self._mode} interpolation is not supported")
        self._input_size = tuple(config["input_size"][1:])
        self._mean, self._std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.name = f"timm/{architecture}"
        self.metric, self.kernel_metric = f"fd_{architecture}", f"kd_{architecture}"
        self.sha256 = tensors_sha256(network.state_dict())
        self.dimensions = int(network.num_features)
        height, width = self._input_size
        self.resize = f"{self._mode} with antialiasing, to {height}x{width}, no crop"

    def extract_batch(self, images: Tensor) -> Extracted:
        x = to_rgb(images).float() / 255
        x = interpolate(x, size=self._input_size, mode=self._mode, antialias=True, align_corners=False)
        return Extracted(self.network((x - self._mean.to(x)) / self._std.to(x)))


def load_weights(network: Any, path: Path) -> None:
    """Load safetensors into a network without a class layer. Raises `InputError` naming the file and what is wrong."""
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        tensors = load_file(file)
        result = network.load_state_dict(tensors, strict=False)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: missing, or cannot be read as safetensors") from error
    except RuntimeError as error:
        raise InputError(f"{file}: weights of another shape than the network's") from error
    heads = network.pretrained_cfg.get("classifier") or "classifier"
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    missing = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    foreign = [key for key in result.unexpected_keys if key.rpartition(".")[0] not in heads]
    if missing or foreign:
        raise InputError(f"{file}: weights of another network: {', '.join((missing + foreign)[:3])} ...")
