"""Finding and reading pretrained networks in diffusers layout.

A source is a folder, a hub id or one weight file; a folder is a component or a whole pipeline (`model_index.json`).
Safetensors come first, sharded or not; pickled weights are read by `torch.load(weights_only=True)` alone, which
executes nothing.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_prune.checksums import sha256
from lightning_prune.protocols import InputError

EMBEDDED = "embedded:"
WEIGHT_FILE = "diffusion_pytorch_model.safetensors"
_ASSETS = Path(__file__).parents[1] / "assets"
_STEM = "diffusion_pytorch_model"
# In order of preference: plain before half precision, safetensors before pickles.
_WEIGHT_NAMES = [f"{_STEM}{end}" for end in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin", ".pth")]
_INDEX_NAMES = [f"{_STEM}{end}.index{kind}.json" for kind in ("", ".fp16") for end in (".safetensors", ".bin")]
# Early releases of diffusers stored these networks under one class, told apart by their norm.
_EARLY_CLASS = "Transformer2DModel"
_EARLY_NORM = {"DiTTransformer2DModel": "ada_norm_zero", "PixArtTransformer2DModel": "ada_norm_single"}
_without_weights: ContextVar[bool] = ContextVar("without_weights", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Networks built inside are on the meta device: shapes without values, and no weight file is opened."""
    token = _without_weights.set(True)
    try:
        yield
    finally:
        _without_weights.reset(token)


def build_network(
    cls: type[nn.Module], weights: str | None, config: Mapping[str, Any], subfolder: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Build `cls` from `config` (random) or from `weights`; also returns the configuration it was built from.

    Raises:
        InputError: no source at all, one that does not hold such a network, tensors of another shape.
    """
    if weights is None:
        if not config:
            raise InputError("denoiser: give `weights` (a path, a hub id or embedded:<name>) or a `config`")
        return _instantiate(cls, config, f"denoiser.config: {cls.__name__}"), dict(config)
    if Path(weights).is_file():
        return _from_file(cls, Path(weights), config)
    return _from_folder(cls, locate(cls, weights, subfolder), config)


def _instantiate(cls: type[nn.Module], config: Mapping[str, Any], source: str) -> nn.Module:
    try:
        with torch.device("meta") if _without_weights.get() else nullcontext():
            network: nn.Module = cls(**config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"{source}: {error}") from error
    return network


def _from_file(cls: type[nn.Module], file: Path, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    if not config:
        raise InputError(f"denoiser.config: {file} holds weights alone; give the arguments of {cls.__name__} too")
    network = _instantiate(cls, config, f"denoiser.config: {cls.__name__}")
    load_weights(network, [file])
    return network, dict(config)


def _from_folder(cls: type[nn.Module], folder: Path, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    stored = read_config(folder / "config.json", cls)
    for key, value in config.items():
        if key in stored and stored[key] != value:
            raise InputError(f"denoiser.config.{key}: {value} asked for, {stored[key]} in {folder / 'config.json'}")
    merged = {**stored, **config}
    network = _instantiate(cls, merged, f"{folder / 'config.json'}: {cls.__name__}")
    if not _without_weights.get():
        _check_manifest(folder)
        load_weights(network, weight_files(folder))
    return network, merged


# Where a network is


def locate(cls: type[nn.Module], weights: str, subfolder: str | None = None) -> Path:
    """The folder that holds the network: `weights` itself, or a component of that pipeline.

    Raises:
        InputError: no such folder, nothing of that name on the hub, or a pipeline without such a component.
    """
    embedded = weights.startswith(EMBEDDED)
    folder = _ASSETS / weights.removeprefix(EMBEDDED) if embedded else Path(weights)
    if folder.exists():
        return _component(cls, folder, subfolder)
    if embedded or not re.fullmatch(r"[\w.-]+/[\w.-]+", weights):
        raise InputError(f"denoiser.weights: {weights}: no such folder")
    return _from_hub(cls, weights, subfolder)


def _component(cls: type[nn.Module], folder: Path, subfolder: str | None) -> Path:
    index = folder / "model_index.json"
    if subfolder is None and (not index.exists() or (folder / "config.json").exists()):
        return folder
    name = subfolder or _listed(cls, index)
    if not (folder / name).is_dir():
        there = sorted(p.parent.name for p in folder.glob("*/config.json"))
        raise InputError(f"{folder / name}: no such component; {folder} holds {', '.join(there) or 'none'}")
    return folder / name


def _listed(cls: type[nn.Module], index: Path) -> str:
    """The one component of `model_index.json` that is a `cls`."""
    entries = {name: entry[1] for name, entry in _read_json(index).items() if _is_component(entry)}
    known = {cls.__name__} | ({_EARLY_CLASS} if cls.__name__ in _EARLY_NORM else set())
    found = [name for name, class_name in entries.items() if class_name in known]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{name} ({class_name})" for name, class_name in entries.items())
    if found:
        raise InputError(f"{index}: lists {' and '.join(found)}; name one with denoiser.subfolder")
    raise InputError(f"{index}: lists no {cls.__name__}; its components are {listed or 'none'}")


def _is_component(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _from_hub(cls: type[nn.Module], repository: str, subfolder: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        root = Path(snapshot_download(repository, allow_patterns=["model_index.json", "config.json", "*/config.json"]))
        folder = _component(cls, root, subfolder)
        if _without_weights.get():
            return folder
        inside = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        for end in ("safetensors", "bin"):
            patterns = (f"{_STEM}.{end}", f"{_STEM}.{end}.index.json", f"{_STEM}-*-of-*.{end}")
            snapshot_download(repository, allow_patterns=[inside + pattern for pattern in patterns])
            if any(folder.glob(f"{_STEM}*.{end}")):
                break
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"denoiser.weights: {repository}: neither a folder nor reachable on the hub") from error
    return folder


# Configurations


def read_config(file: Path, cls: type[nn.Module]) -> dict[str, Any]:
    """Read a diffusers `config.json` and check that it belongs to `cls`."""
    content = _read_json(file)
    name = content.get("_class_name", cls.__name__)
    settings = {key: value for key, value in content.items() if not key.startswith("_")}
    if name == _EARLY_CLASS and content.get("norm_type") == _EARLY_NORM.get(cls.__name__, ""):
        return {key: value for key, value in settings.items() if key in inspect.signature(cls).parameters}
    if name != cls.__name__:
        raise InputError(f"{file}: holds a {name}, expected {cls.__name__}")
    return settings


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as a diffusers configuration") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: cannot be read as a diffusers configuration")
    return content


def _check_manifest(folder: Path) -> None:
    """Compare the weights with their checksum where the folder is an artifact of ours."""
    manifest, weights = folder / "pruning.json", folder / WEIGHT_FILE
    if not manifest.exists():
        return
    expected = json.loads(manifest.read_text()).get("files", {}).get(WEIGHT_FILE)
    if not weights.exists() or sha256(weights) != expected:
        raise InputError(f"{weights}: missing, or its checksum differs from pruning.json")


# Weights


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a component: one, or the shards of one.

    Raises:
        InputError: there is none, or a shard that the index lists is missing.
    """
    for name in (*_WEIGHT_NAMES, *_INDEX_NAMES):
        if (folder / name).exists():
            return _shards(folder / name) if name.endswith(".json") else [folder / name]
    raise InputError(f"{folder / WEIGHT_FILE}: missing or damaged weight file")


def _shards(index: Path) -> list[Path]:
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index}: lists no weights")
    names = sorted(set(listed.values()))
    for name in names:
        if Path(name).name != name or not (index.parent / name).exists():
            raise InputError(f"{index.parent / name}: missing, though {index.name} lists it")
    return [index.parent / name for name in names]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a weight file by name. Raises `InputError` for one that is damaged or holds anything else."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: missing or damaged weight file") from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{file}: damaged, or not tensors alone; nothing else is unpickled") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{file}: is no dictionary of tensors by name")
    return content


def first_difference(
    own: Mapping[str, Tensor], other: Mapping[str, Tensor], own_name: str, other_name: str
) -> str | None:
    """What keeps `other` from being loaded into `own`, in words; None if every tensor has its counterpart."""
    for name in [*own, *other]:
        if name not in own or name not in other:
            return f"tensor {name} has no counterpart in the {own_name if name not in own else other_name}"
        if own[name].shape != other[name].shape:
            return f"{name} has shape {list(other[name].shape)}, expected {list(own[name].shape)}"
    return None


def load_weights(network: nn.Module, files: list[Path]) -> None:
    """Load weight files strictly into `network`, naming the file and the first tensor that does not fit.

    Tensors that match the network's `may_be_missing`, a regular expression, keep their values where the files lack
    them.
    """
    if _without_weights.get():
        return
    state: dict[str, Tensor] = {}
    expected = network.state_dict()
    for file in files:
        tensors = read_tensors(file)
        own = {name: expected[name] for name in tensors if name in expected}
        if difference := first_difference(own, tensors, "network", "file"):
            raise InputError(f"{file}: {difference}")
        state |= tensors
    if optional := getattr(network, "may_be_missing", None):
        state |= {name: own for name, own in expected.items() if name not in state and re.fullmatch(optional, name)}
    if difference := first_difference(expected, state, "network", "file" if len(files) == 1 else "shards"):
        raise InputError(f"{files[0]}: {difference}")
    network.load_state_dict(state)
