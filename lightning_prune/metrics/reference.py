"""Moments of reference images: computed once, kept with a checksum, exchanged with pytorch-fid and ADM.

The cache is an `.npz` with `mu` and `sigma`, so pytorch-fid reads it as it is, and a `description` in JSON: extractor,
its checksum, resize, data, count, and a SHA-256 over all of it. With Inception it also has ADM's `mu_s` and `sigma_s`.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.checksums import sha256
from lightning_prune.files import written_whole
from lightning_prune.metrics.extractors.base import Extracted, FeatureExtractor, check_images, to_rgb
from lightning_prune.metrics.extractors.inception_weights import cache_folder
from lightning_prune.metrics.frechet import Moments
from lightning_prune.protocols import InputError

Arrays = dict[str, Any]
Images = Tensor | Iterable[Tensor]


@dataclass(frozen=True)
class Reference:
    """Moments of reference images under one extractor.

    Attributes:
        extractor: its name.
        extractor_sha256: checksum of its weights.
        resize: how images reached its input size.
        data: which images they are, in words that no other set of images shares.
        moments: of the pooled features.
        spatial: of the spatial features, for sFID; None where the extractor has none.
    """

    extractor: str
    extractor_sha256: str
    resize: str
    data: str
    moments: Moments
    spatial: Moments | None = None


def extract_all(extractor: FeatureExtractor, images: Images) -> Extracted:
    """Features of uint8 `images` [N, C, H, W], at once or in parts. Raises `InputError` if there are none."""
    found = [extractor.extract(part) for part in ([images] if isinstance(images, Tensor) else images)]
    if not found:
        raise InputError(f"images: there are none that can be read, so none for {extractor.name}")
    return Extracted.concatenate(found)


def compute_reference(extractor: FeatureExtractor, images: Images, data: str) -> Reference:
    """Moments of uint8 `images` [N, C, H, W], described by `data`."""
    extracted = extract_all(extractor, images)
    spatial = None if extracted.spatial is None else Moments.of(extracted.spatial)
    return _reference(extractor, data, Moments.of(extracted.features), spatial)


def cached_reference(
    extractor: FeatureExtractor, data: str, images: Callable[[], Images], folder: Path | None = None
) -> Reference:
    """The reference out of `folder` (by default the cache), computed from `images()` and stored there the first time.

    `data` is what the file is found by. It has to identify the images: put a checksum or a version into it.
    """
    folder = folder or cache_folder() / "references"
    key = hashlib.sha256("\n".join([extractor.name, extractor.sha256, extractor.resize, data]).encode()).hexdigest()
    file = folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', extractor.name)}-{key[:12]}.npz"
    if file.exists():
        return load_reference(file, extractor, data)
    reference = compute_reference(extractor, images(), data)
    save_reference(reference, file)
    return reference


def save_reference(reference: Reference, file: Path) -> None:
    """Write `file`; it is either complete or not there."""
    arrays = _arrays(reference)
    description = {
        "extractor": reference.extractor,
        "extractor_sha256": reference.extractor_sha256,
        "resize": reference.resize,
        "data": reference.data,
        "samples": reference.moments.samples,
    }
    description["sha256"] = _checksum(arrays, description)
    _write(file, {**arrays, "description": np.array(json.dumps(description))})


def load_reference(file: Path, extractor: FeatureExtractor, data: str | None = None) -> Reference:
    """Read what `save_reference` wrote.

    Raises:
        InputError: the file is missing or damaged, or holds moments of another extractor or, if given, other `data`.
    """
    arrays = _read(file)
    try:
        description = json.loads(str(arrays.pop("description")))
        stated = description.pop("sha256")
        found = _reference(extractor, description["data"], *_moments(arrays, int(description["samples"]), file))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not a reference written by lightning_prune; import it instead") from error
    if stated != _checksum(arrays, description):
        raise InputError(f"{file}: checksum differs from the one inside; the file is damaged")
    for key in ("extractor", "extractor_sha256", "resize"):
        if description[key] != getattr(found, key):
            raise InputError(f"{file}: {key} is {description[key]}, but {getattr(found, key)} is in use")
    if data is not None and description["data"] != data:
        raise InputError(f"{file}: reference of {description['data']!r}, expected {data!r}")
    return found


def read_reference(file: Path, extractor: FeatureExtractor, samples: int | None) -> Reference:
    """A reference in any of the formats; `samples` is the count behind it where the file does not say.

    Raises:
        InputError: see `load_reference` and `import_statistics`; or a foreign file and no count.
    """
    if "description" in _read(file):
        return load_reference(file, extractor)
    if samples is None:
        raise InputError(f"{file}: does not say how many images it is of; give reference_samples")
    return import_statistics(file, extractor, samples, f"{file.name}, sha256 {sha256(file)}")


def import_statistics(file: Path, extractor: FeatureExtractor, samples: int, data: str) -> Reference:
    """Read `mu` and `sigma` of pytorch-fid, and `mu_s` and `sigma_s` too where ADM's evaluator has added them.

    The formats record neither the extractor nor the count: both are the caller's word. Moments of pytorch-fid's own
    command come from its resize, which differs from TensorFlow's on images that are not 299x299.

    Raises:
        InputError: the file is missing, damaged, not finite, not symmetric, or of other dimensions.
    """
    if samples < 2:
        raise InputError(f"{file}: a reference has at least two samples, got {samples}")
    moments, spatial = _moments(_read(file), samples, file)
    if len(moments.mean) != extractor.dimensions:
        raise InputError(f"{file}: {len(moments.mean)} dimensions, but {extractor.name} has {extractor.dimensions}")
    return _reference(extractor, data, moments, spatial)


def export_pytorch_fid(reference: Reference, file: Path) -> None:
    """Write `mu` and `sigma` alone."""
    arrays = _arrays(reference)
    _write(file, {key: arrays[key] for key in ("mu", "sigma")})


def export_adm(reference: Reference, images: Tensor, file: Path) -> None:
    """Write a reference batch of ADM's evaluator: statistics of all images, and uint8 `images` [N, C, H, W] of them.

    The evaluator takes precision and recall from the images, its distances from the statistics.
    """
    if reference.spatial is None:
        raise InputError(f"{file}: ADM's format needs spatial features, which {reference.extractor} does not have")
    check_images(images, "ADM's format")
    _write(file, {**_arrays(reference), "arr_0": to_rgb(images).permute(0, 2, 3, 1).contiguous().numpy()})


def read_batch(file: Path) -> Tensor:
    """Images, uint8 [N, C, H, W], of a sample batch or reference batch of ADM (`arr_0`, [N, H, W, C]).

    Raises:
        InputError: the file is missing, damaged, or has no such images.
    """
    arrays = _read(file)
    if "arr_0" not in arrays or arrays["arr_0"].ndim != 4 or arrays["arr_0"].dtype != np.uint8:
        raise InputError(f"{file}: no images; expected arr_0, uint8 [N, H, W, C]")
    return torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2).contiguous()


def _reference(extractor: FeatureExtractor, data: str, moments: Moments, spatial: Moments | None) -> Reference:
    return Reference(extractor.name, extractor.sha256, extractor.resize, data, moments, spatial)


def _arrays(reference: Reference) -> Arrays:
    """Moments under the names that pytorch-fid and ADM gave them."""
    arrays = {"mu": reference.moments.mean.numpy(), "sigma": reference.moments.covariance.numpy()}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean.numpy(), "sigma_s": reference.spatial.covariance.numpy()}
    return arrays


def _moments(arrays: Mapping[str, Any], samples: int, file: Path) -> tuple[Moments, Moments | None]:
    def pair(mean: str, covariance: str) -> Moments:
        mu, sigma = (torch.from_numpy(np.asarray(arrays[key], dtype=np.float64)) for key in (mean, covariance))
        if mu.dim() != 1 or sigma.shape != (len(mu), len(mu)):
            raise InputError(f"{file}: {mean} {list(mu.shape)} and {covariance} {list(sigma.shape)} do not fit")
        if not (torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
            raise InputError(f"{file}: {mean} or {covariance} is not finite")
        if not torch.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-8 * float(sigma.abs().max())):
            raise InputError(f"{file}: {covariance} is not symmetric, so it is no covariance")
        return Moments(mu, sigma, samples)

    if "mu" not in arrays or "sigma" not in arrays:
        raise InputError(f"{file}: no moments; expected mu [D] and sigma [D, D]")
    return pair("mu", "sigma"), pair("mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= set(arrays) else None


def _checksum(arrays: Arrays, description: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape}".encode())
        digest.update(arrays[key].tobytes())
    return digest.hexdigest()


def _read(file: Path) -> Arrays:
    """Every array of an `.npz`. Objects are refused: reading them would execute what they say."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{file}: missing, or cannot be read as npz of plain arrays") from error


def _write(file: Path, arrays: Arrays) -> None:
    with written_whole(file) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)
