"""The artifact: a folder of safetensors and JSON that loads in diffusers and here, and executes nothing.

    config.json  diffusion_pytorch_model.safetensors     what `from_pretrained` of the diffusers class reads
    gates.json                                           which blocks run at which step, where a schedule was found
    gates-<budget>.json                                  the like for every further budget of the same search
    pruning.json                                         the manifest: what was done, checksums of every file

Masked weights are written as dense tensors with valid zeros: any tool loads them. Stages of slim networks have
`stages.safetensors` instead, and the configuration is that of the network they were cut from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lightning_prune import __version__
from lightning_prune.checksums import sha256
from lightning_prune.diffusion.models import Denoiser, families
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.routing import StagedDenoiser
from lightning_prune.export import packed, staged, switchable
from lightning_prune.export.gates import GATES, apply_gates
from lightning_prune.protocols import InputError
from lightning_prune.pruning.masks import effective_state, patterns_now

SCHEMA = 1
MANIFEST = "pruning.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_artifact(
    denoiser: Denoiser, folder: Path, method: str, details: Mapping[str, Any], files: Mapping[str, str] | None = None
) -> Path:
    """Write an artifact.

    Args:
        denoiser: the network to store.
        folder: where to; created.
        method: name of the method that made it.
        details: further manifest entries (`sampler`, `protocol`, `results`, ...).
        files: texts of further files by name, such as gates.json.

    Returns:
        `folder`.
    """
    final, folder = folder, folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if isinstance(denoiser, StagedDenoiser):
        network_class = denoiser.family.network_class.__name__
        weights, own = staged.FILE, staged.write(denoiser, folder)
    else:
        network_class, weights = denoiser.network_class.__name__, _WEIGHTS
        state = effective_state(denoiser.network)
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, folder / _WEIGHTS)
        own = {}
    config = {"_class_name": network_class, **denoiser.config()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    manifest = {
        "schema": SCHEMA,
        "lightning_prune": __version__,
        "method": [method],
        "base": _base(denoiser, network_class),
        "files": {name: sha256(folder / name) for name in (weights, "config.json", *(files or {}))},
        "masks": {name: str(pattern) for name, pattern in patterns_now(denoiser.network).items()},
        **own,
        **details,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    # Whole or not at all: a reader never finds half an artifact.
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    return final


def _base(denoiser: Denoiser, network_class: str) -> dict[str, Any]:
    """The network it was made from, and what its family has to be told besides the weights."""
    base = {"class": network_class, "weights": denoiser.weights}
    arguments = denoiser.arguments()
    return base | ({"arguments": arguments} if arguments else {})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        InputError: no manifest, one of a newer schema, or a file whose checksum differs.
    """
    file = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        schema, files = int(manifest["schema"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: missing or damaged manifest") from error
    if schema > SCHEMA:
        raise InputError(f"{file}: schema {schema} is newer than this version reads ({SCHEMA}); update lightning_prune")
    for name, expected in files.items():
        if Path(name).name != name:
            raise InputError(f"{file}: {name!r} is not a file of the artifact")
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise InputError(f"{folder / name}: missing, or its checksum differs from {MANIFEST}")
    return manifest


def load(path: str | Path, device: str | None = None, gates: str = GATES) -> Denoiser:
    """Return the denoiser of an artifact, in evaluation mode; under its schedule of gates where it has one.

    Args:
        path: the artifact's folder.
        device: where to; there, packed 2:4 layers run on sparse kernels, in the type they were packed in. Null leaves
            the network where it is built, with zeros in the place of what was packed away.
        gates: file name of the schedule to run, where it has several.

    Raises:
        InputError: a schedule that is not there, a missing, damaged or newer artifact, a network class no backbone file
            describes, or packed layers for a device without a sparse kernel.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if gates != GATES and gates not in manifest["files"]:
        raise InputError(f"{folder / gates}: no schedule of this artifact")
    denoiser = _read(folder, manifest, gates).eval()
    if device is None:
        return denoiser
    if "semi_structured" in manifest:
        return packed.placed(denoiser, manifest, device)
    return denoiser.to(device)


def _read(folder: Path, manifest: Mapping[str, Any], gates: str) -> Denoiser:
    name, arguments = manifest["base"]["class"], manifest["base"].get("arguments", {})
    if name not in families():
        raise InputError(f"{folder / MANIFEST}: no backbone is known for {name}")
    if "stages" in manifest:
        return staged.read(families()[name], folder, manifest)
    if "semi_structured" in manifest:
        return packed.read_packed(families()[name], folder, manifest)
    denoiser: Denoiser = families()[name](weights=str(folder), **arguments)
    if switchable.KEY in manifest:
        denoiser = switchable.masked(denoiser, manifest[switchable.KEY])
    if gates in manifest["files"]:
        denoiser = apply_gates(denoiser, folder / gates, Process.from_scheduler(manifest["sampler"]))
    return denoiser
