"""`lightning_prune export`: a checkpoint into an artifact, or an artifact into another format. It only converts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_prune import methods
from lightning_prune.cli.checkpoints import check_checkpoint, read_checkpoint
from lightning_prune.diffusion.gated import StepGated
from lightning_prune.diffusion.routing import StagedDenoiser
from lightning_prune.export import load, save_artifact, switchable
from lightning_prune.export.artifact import read_manifest
from lightning_prune.export.homogeneous import write_homogeneous
from lightning_prune.export.packed import TOKENS, write_packed
from lightning_prune.export.semi_structured import missing
from lightning_prune.module import PruningModule
from lightning_prune.protocols import ArtifactFiles, InputError


def run(args: Sequence[str]) -> int:
    """Parse `args` and write the artifact. Returns the exit status."""
    options = parse(args)
    if options.output.exists():
        raise InputError(f"--output: {options.output} exists already")
    if options.format == "semi-structured":
        _pack(options)
    elif options.format == "homogeneous":
        _homogeneous(options)
    else:
        _from_checkpoint(options)
    print(f"wrote {options.output}")
    return 0


def parse(args: Sequence[str]) -> argparse.Namespace:
    """The options, checked against each other."""
    parser = argparse.ArgumentParser(prog="lightning_prune export", description=__doc__, exit_on_error=False)
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint to convert, for formats dense and switchable")
    parser.add_argument("--artifact", type=Path, help="artifact to convert, for the other two formats")
    parser.add_argument("--config", type=Path, help="config of the run; by default the one in the checkpoint")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; must not exist")
    formats = ["dense", "switchable", "semi-structured", "homogeneous"]
    parser.add_argument("--format", choices=formats, default="dense", help="default dense")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of packed layers")
    parser.add_argument("--device", help="cuda: time every layer on it and pack those that win; default: pack all")
    parser.add_argument("--tokens", type=int, help=f"rows to time with, images x tokens of each; default {TOKENS}")
    options = parser.parse_args(list(args))
    needed = "ckpt_path" if options.format in ("dense", "switchable") else "artifact"
    if getattr(options, needed) is None:
        raise InputError(f"--{needed}: needed for --format {options.format}")
    if options.tokens is not None and (options.device is None or options.format != "semi-structured"):
        raise InputError("--tokens: nothing is timed without --format semi-structured and --device")
    options.tokens = TOKENS if options.tokens is None else options.tokens
    if options.tokens < 1:
        raise InputError(f"--tokens: {options.tokens} is not positive")
    other = "artifact" if needed == "ckpt_path" else "ckpt_path"
    if getattr(options, other) is not None:
        raise InputError(f"--{other}: --format {options.format} is made from --{needed}")
    return options


def _from_checkpoint(options: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(options.ckpt_path)
    config = read_config(options.config) if options.config else yaml.safe_load(checkpoint.get("config", "")) or {}
    module = build_module(config)
    module.load_state_dict(check_checkpoint(options.ckpt_path, module)["state_dict"])
    module.on_load_checkpoint(checkpoint)
    module.weights_changed()
    method = type(module).__name__.lower()
    result = list(module.variants().values())[-1].denoiser
    files = module.artifact_files() if isinstance(module, ArtifactFiles) else {}
    details: dict[str, Any] = {"sampler": module.process.scheduler_config}
    if options.format == "switchable":
        if isinstance(result, StagedDenoiser):
            raise InputError("--format switchable: masks of slim networks are stored as zeros alone yet; use dense")
        details[switchable.KEY] = switchable.released(result)
    save_artifact(result, options.output, method, details, files)


def _pack(options: argparse.Namespace) -> None:
    denoiser, manifest = load(options.artifact), read_manifest(options.artifact)
    if not manifest.get("masks") or "semi_structured" in manifest:
        raise InputError(f"--artifact: {options.artifact}: holds no dense 2:4 layers to pack")
    if isinstance(denoiser, StagedDenoiser | StepGated):
        raise InputError(f"--artifact: {options.artifact}: slim stages and gated networks are not packed yet")
    dtype = getattr(torch, options.dtype)
    chosen = write_packed(denoiser, manifest, options.artifact, options.output, dtype, options.device, options.tokens)
    print(f"packed {len(chosen.packed)} layers, left {len(chosen.dense)} masked layers dense")
    for name, reason in chosen.dense.items():
        print(f"  dense: {name}: {reason}")
    if options.device is None:
        print(f"  nothing was timed: {missing('cuda') or 'no --device was given'}")


def _homogeneous(options: argparse.Namespace) -> None:
    denoiser = load(options.artifact)
    if not isinstance(denoiser, StagedDenoiser):
        raise InputError(f"--artifact: {options.artifact}: holds no stages")
    for folder in write_homogeneous(denoiser, options.output):
        print(f"  {folder.name}: a stock configuration")


def read_config(file: Path) -> dict[str, Any]:
    """Read a YAML file."""
    try:
        content: dict[str, Any] = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config: {file}: cannot be read as YAML") from error
    return content


def build_module(config: dict[str, Any]) -> PruningModule:
    """The module that the `model` section of a config describes."""
    if "model" not in config:
        raise InputError("--config: no `model` section; give the config of the run")
    methods.discover()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PruningModule, "model")
    # Renamed in jsonargparse 4.49.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    module: PruningModule = instantiate(parser.parse_object({"model": config["model"]})).model
    return module
