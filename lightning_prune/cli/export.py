"""`lightning_prune export`: turn a checkpoint into an artefact. It converts; it never trains or prunes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lightning_prune import methods
from lightning_prune.cli.checkpoints import check_checkpoint, read_checkpoint
from lightning_prune.export import save_artifact
from lightning_prune.module import PruningModule
from lightning_prune.protocols import ArtifactFiles, InputError


def run(args: Sequence[str]) -> int:
    """Parse `args` and write the artefact. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="lightning_prune export", description=__doc__, exit_on_error=False)
    parser.add_argument("--ckpt_path", required=True, type=Path, help="checkpoint to convert")
    parser.add_argument("--config", type=Path, help="config of the run; by default the one in the checkpoint")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; must not exist")
    options = parser.parse_args(list(args))
    if options.output.exists():
        raise InputError(f"--output: {options.output} exists already")
    checkpoint = read_checkpoint(options.ckpt_path)
    config = read_config(options.config) if options.config else yaml.safe_load(checkpoint.get("config", "")) or {}
    module = build_module(config)
    module.load_state_dict(check_checkpoint(options.ckpt_path, module)["state_dict"])
    module.weights_changed()
    method = type(module).__name__.lower()
    result = list(module.variants().values())[-1].denoiser
    files = module.artifact_files() if isinstance(module, ArtifactFiles) else {}
    save_artifact(result, options.output, method, {"sampler": module.process.scheduler_config}, files)
    print(f"wrote {options.output}")
    return 0


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
    module: PruningModule = parser.instantiate_classes(parser.parse_object({"model": config["model"]})).model
    return module
