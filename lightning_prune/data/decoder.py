"""What makes pictures of latents: the decoder of a pipeline's autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_prune.data.encoders import (
    autoencoder_config,
    autoencoder_place,
    fingerprint,
    latent_factors,
    load_autoencoder,
)
from lightning_prune.data.latent_files import Manifest
from lightning_prune.protocols import InputError

_STEM = "diffusion_pytorch_model"


@contextmanager
def _as_key() -> Iterator[None]:
    """Errors that begin with "pipeline" as those of the key in a config."""
    try:
        yield
    except InputError as error:
        raise InputError(f"data.decoder.{error}") from error


@dataclass
class LatentDecoder:
    """The autoencoder that makes pictures of latents, for grids, reports and `predict`.

    Its weights are loaded when a picture or their checksum is first asked for, by the process that asks, and go to the
    device of the latents. Shift and scale are those of its own configuration, but for latents that were cached with a
    scale of their own.

    Args:
        pipeline: diffusers folder of a whole pipeline or of its autoencoder alone, or a hub id.
        batch_size: latents decoded at once.
        tiled: decode in overlapping tiles, for large pictures on small devices. At seams they differ a little from
            pictures decoded in one piece, so the protocol says so.
    """

    pipeline: str
    batch_size: int = 4
    tiled: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"data.decoder.batch_size: {self.batch_size} is not positive")
        self._device = torch.device("cpu")
        self._scale: float | None = None

    # Before a run

    def fetch(self) -> None:
        """See that the weights are here, downloaded where `pipeline` is a hub id; one process of each machine does.

        Raises:
            InputError: no such autoencoder, or weights that are missing or cut.
        """
        with _as_key():
            for file in _weights(self._folder):
                _check_whole(file)

    def adopt(self, root: Path, manifest: Manifest) -> None:
        """Take over the scale of latents to be decoded, and compare the rest with them; no weights are read.

        Raises:
            InputError: no autoencoder, or one whose configuration is of other latents.
        """
        self._scale = manifest.settings.get("scale")
        with _as_key():
            ours = {"channels": self.config.get("latent_channels"), **self._factors()}
            theirs = {"channels": manifest.sample_shape[0], "scale": manifest.scale, "shift": manifest.shift}
            for key, value in ours.items():
                if value is not None and value != theirs[key]:
                    raise InputError(
                        f"pipeline: {self.pipeline}: {key} {value}, but latents in {root} have {theirs[key]}"
                    )

    def _factors(self) -> dict[str, list[float]]:
        scale, shift = latent_factors(self.config, self._scale)
        return {"scale": scale, "shift": shift}

    @cached_property
    def _folder(self) -> Path:
        place = autoencoder_place(self.pipeline).get("subfolder", "")
        return (Path(self.pipeline) if Path(self.pipeline).is_dir() else _download(self.pipeline, place)) / place

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of the autoencoder."""
        return autoencoder_config(str(self._folder))

    def picture_shape(self, latent: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of the picture [C, H, W] of a latent [C, h, w]; None where the configuration does not tell."""
        stages = self.config.get("block_out_channels")
        if self.config["_class_name"] != "AutoencoderKL" or not stages:
            return None
        factor = 2 ** (len(stages) - 1)
        return (self.config.get("out_channels", 3), *(factor * side for side in latent[1:]))

    # Decoding

    @cached_property
    def network(self) -> Any:
        """The autoencoder, loaded when it is first asked for."""
        with _as_key():
            network = load_autoencoder(str(self._folder))
            if self.tiled and not hasattr(network, "enable_tiling"):
                raise InputError(f"tiled: {type(network).__name__} does not decode in tiles")
        if self.tiled:
            network.enable_tiling()
        return network

    def to(self, device: torch.device | str) -> Self:
        """Decode on `device` from now on."""
        self._device = torch.device(device)
        return self

    def decode(self, latents: Tensor, gradients: bool = False) -> Tensor:
        """Pictures [B, 3, H, W], in [-1, 1] but for overshoot, of `latents` [B, C, h, w] as denoisers see them.

        With `gradients` they are differentiable in the latents.
        """
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            return self._decoded(latents)

    def _decoded(self, latents: Tensor) -> Tensor:
        network = self.network.to(self._device).requires_grad_(False)
        factors = latent_factors(self.config, self._scale)
        scale, shift = (torch.tensor(f, device=self._device).view(-1, 1, 1) for f in factors)
        raw = latents.to(self._device).float() / scale + shift
        return torch.cat([network.decode(part).sample for part in raw.split(self.batch_size)])

    def describe(self) -> str:
        """What pictures depend on, wherever it is stored, for protocols."""
        factors = ", ".join(f"{key} {' '.join(f'{v:g}' for v in values)}" for key, values in self._factors().items())
        tiles = ", in tiles" if self.tiled else ""
        return f"{self.config['_class_name']}, sha256 {self._fingerprint}, {factors}{tiles}"

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.network)


def _download(repository: str, place: str) -> Path:
    inside = f"{place}/" if place else ""
    patterns = ("config.json", f"{_STEM}.safetensors", f"{_STEM}.safetensors.index.json", f"{_STEM}-*-of-*.safetensors")
    try:
        return Path(snapshot_download(repository, allow_patterns=["model_index.json", *(inside + p for p in patterns)]))
    except (OSError, ValueError) as error:
        raise InputError(f"pipeline: {repository}: neither a folder nor reachable on the hub") from error


def _weights(folder: Path) -> list[Path]:
    """The files that diffusers reads: one, or the shards of one."""
    whole = folder / f"{_STEM}.safetensors"
    shards = folder.glob(f"{_STEM}-*-of-*.safetensors") if (folder / f"{whole.name}.index.json").exists() else ()
    files = [whole] if whole.exists() else sorted(shards)
    if not files:
        raise InputError(f"pipeline: {folder}: no {whole.name} in it")
    return files


def _check_whole(file: Path) -> None:
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"pipeline: {file}: damaged weight file") from error
