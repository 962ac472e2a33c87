"""FID's Inception of 2015-12-05, in torch-fidelity's implementation."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

from lightning_prune.metrics.extractors.base import Extracted, NetworkExtractor, to_rgb
from lightning_prune.metrics.extractors.inception_weights import NAME, TENSORS_SHA256, cached_file, read_weights

Layer = Literal["64", "192", "768", "2048"]
_SPATIAL_CHANNELS = 7


class InceptionExtractor(NetworkExtractor):
    """2048 pooled features ("pool_3"), and what sFID and the Inception Score need, of images of any size.

    Spatial features are those of ADM's evaluator (Dhariwal and Nichol 2021, after Nash et al. 2021): the first 7
    channels of "mixed_6/conv:0", which is the 1x1 branch of `Mixed_6d` behind its ReLU, 7 x 17 x 17 = 2023 numbers.
    Class scores leave out the bias of the class layer, as ADM and torch-fidelity do; without `fc.weight` among the
    weights there are none. The checksum covers the weights without the class layer, which has no published one.

    Args:
        weights: safetensors file with pytorch-fid's names; by default the one that `prefetch inception` made.
        layer: "2048", or an earlier pooled layer, whose distance is not FID: it is called `fid_64` and the like.
        batch_size: images that go through the network at once.
    """

    name = NAME
    sha256 = TENSORS_SHA256
    resize = "bilinear as in TensorFlow 1, to 299x299"

    def __init__(self, weights: str | Path | None = None, layer: Layer = "2048", batch_size: int = 32) -> None:
        tensors = read_weights(Path(weights) if weights else cached_file())
        self.has_logits = layer == "2048" and "fc.weight" in tensors
        network = build_network(tensors, [layer, "logits_unbiased"] if self.has_logits else [layer])
        fold_batch_norms(network)
        # Convolutions are faster with the channels innermost, on CPU and GPU alike.
        super().__init__(network.to(memory_format=torch.channels_last), batch_size)
        self.metric, self.kernel_metric = ("fid", "kid") if layer == "2048" else (f"fid_{layer}", f"kid_{layer}")
        self.dimensions = int(layer)
        self._spatial: Tensor | None = None
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._spatial = output[:, :_SPATIAL_CHANNELS].flatten(1)

    def extract_batch(self, images: Tensor) -> Extracted:
        self._spatial = None  # layers 64 and 192 end before it
        found = self.network(to_rgb(images))
        return Extracted(found[0], found[1] if self.has_logits else None, self._spatial)


def build_network(tensors: Mapping[str, Tensor], layers: Sequence[str]) -> FeatureExtractorInceptionV3:
    """torch-fidelity's network with these weights, giving `layers`; a missing class layer is filled with zeros.

    Its constructor takes weights from `torch.load` alone, and downloads them without a file; what it is given here
    was written to memory the moment before, so no foreign pickle is read.
    """
    complete = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008), **tensors}
    memory = io.BytesIO()
    torch.save(complete, memory)
    memory.seek(0)
    return FeatureExtractorInceptionV3(NAME, list(layers), feature_extractor_weights_path=memory)


def fold_batch_norms(network: nn.Module) -> None:
    """Put every batch norm into the convolution before it: the same function, in fewer passes over memory."""
    for unit in network.modules():
        if isinstance(unit, BasicConv2d):
            unit.conv, unit.bn = fuse_conv_bn_eval(unit.conv, unit.bn), nn.Identity()
