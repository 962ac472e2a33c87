"""An artifact whose 2:4 layers are stored packed: about half the bytes, and ready for a sparse kernel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lightning_prune.checksums import sha256
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.pretrained import first_difference, read_config, read_tensors
from lightning_prune.export.semi_structured import Plan, accelerate, missing, pack, plan, unpack
from lightning_prune.metrics.latency import interleaved_medians
from lightning_prune.protocols import InputError, Sparsity

FILE = "semi_structured.safetensors"
TOKENS = 4096  # rows that a layer is timed with: 16 images of 256 tokens
REPEATS = 20


def write_packed(
    denoiser: Denoiser,
    manifest: Mapping[str, Any],
    source: Path,
    target: Path,
    dtype: torch.dtype,
    device: str | None,
    tokens: int = TOKENS,
) -> Plan:
    """Write the artifact `source`, loaded as `denoiser`, into the new folder `target` with its 2:4 layers packed.

    With a device every layer is timed dense and sparse on `tokens` rows, and stays dense where it does not win; without
    one all that fit are packed, and the manifest says that nothing was measured.

    Raises:
        InputError: no masked layer can be packed, or the device has no kernel.
    """
    patterns = {name: Sparsity.parse(text) for name, text in manifest.get("masks", {}).items()}
    chosen = plan(denoiser.network, patterns, dtype)
    seconds: dict[str, dict[str, float]] = {}
    if device is not None:
        chosen, seconds = faster(denoiser, chosen, dtype, device, tokens)
    partial = target.with_name(f".{target.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(pack(denoiser.network.state_dict(), chosen.packed, dtype), partial / FILE)
    beside = [name for name in manifest["files"] if not name.endswith(".safetensors")]
    for name in beside:
        shutil.copy(source / name, partial / name)
    content = dict(manifest) | {
        "files": {name: sha256(partial / name) for name in (FILE, *beside)},
        "semi_structured": {
            "dtype": str(dtype).removeprefix("torch."),
            "packed": list(chosen.packed),
            "dense": chosen.dense,
            "seconds": seconds or "not measured",
            "tokens": tokens if seconds else None,
        },
    }
    (partial / "pruning.json").write_text(json.dumps(content, indent=2) + "\n")
    partial.rename(target)
    return chosen


def faster(
    denoiser: Denoiser, chosen: Plan, dtype: torch.dtype, device: str, tokens: int = TOKENS
) -> tuple[Plan, dict[str, dict[str, float]]]:
    """Keep those layers packed that beat their dense selves on `device`; both medians in seconds by layer."""
    if reason := missing(device):
        raise InputError(f"--device: {reason}")
    kept, dense, seconds = [], dict(chosen.dense), {}
    for name in chosen.packed:
        seconds[name] = _timed(denoiser, name, dtype, device, tokens)
        if seconds[name]["semi_structured"] < seconds[name]["dense"]:
            kept.append(name)
        else:
            dense[name] = "slower than dense in the measured pair"
    return Plan(tuple(kept), dense), seconds


def _timed(denoiser: Denoiser, name: str, dtype: torch.dtype, device: str, tokens: int) -> dict[str, float]:
    layer = denoiser.network.get_submodule(name)
    assert isinstance(layer, torch.nn.Linear)
    arms = {kind: torch.nn.Sequential(_copy(layer)).to(device, dtype) for kind in ("dense", "semi_structured")}
    accelerate(arms["semi_structured"], ("0",), device)
    x = torch.randn(tokens, layer.in_features, device=device, dtype=dtype)

    def call(module: torch.nn.Module) -> Any:
        def run() -> None:
            with torch.no_grad():
                module(x)
            torch.cuda.synchronize()

        return run

    return interleaved_medians({kind: call(module) for kind, module in arms.items()}, REPEATS)


def _copy(layer: torch.nn.Linear) -> torch.nn.Linear:
    copy = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    copy.load_state_dict(layer.state_dict())
    return copy.requires_grad_(False)


def read_packed(family: type[Denoiser], folder: Path, manifest: Mapping[str, Any]) -> Denoiser:
    """The denoiser of a packed artifact, with valid zeros, in its stored type.

    Raises:
        InputError: tensors that do not fit the configuration beside them.
    """
    arguments = manifest["base"].get("arguments", {})
    denoiser = family(config=read_config(folder / "config.json", family.network_class), **arguments)
    try:
        state = unpack(read_tensors(folder / FILE))
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{folder / FILE}: does not hold packed layers as {error} would need") from error
    if difference := first_difference(denoiser.network.state_dict(), state, "network", "file"):
        raise InputError(f"{folder / FILE}: {difference}")
    denoiser.network.to(next(value.dtype for value in state.values() if value.is_floating_point()))
    denoiser.network.load_state_dict(state)
    denoiser.weights = manifest["base"].get("weights")
    return denoiser


def sparse_layers(manifest: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the layers of an artifact that a sparse kernel can run on a device in a type; often none."""
    found = manifest.get("semi_structured")
    if found is None or getattr(torch, found["dtype"]) != dtype or missing(device) is not None:
        return ()
    return tuple(found["packed"])


def placed(denoiser: Denoiser, manifest: Mapping[str, Any], device: torch.device | str) -> Denoiser:
    """The denoiser of a packed artifact on a device, in place, its packed layers as semi-structured tensors.

    Raises:
        InputError: a device without a sparse kernel.
    """
    if reason := missing(device):
        raise InputError(f"device: {reason}; without a device the artifact loads with valid zeros")
    dtype = getattr(torch, manifest["semi_structured"]["dtype"])
    denoiser.to(device, dtype)
    accelerate(denoiser.network, sparse_layers(manifest, device, dtype), device)
    return denoiser
