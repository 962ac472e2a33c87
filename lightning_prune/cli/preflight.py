"""What can be known about a run before it waits in a queue: its config, and whether what it reads is here.

Compute nodes have no internet, and a job that fails after a night in a queue has cost a night.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from lightning_prune import methods
from lightning_prune.cli.trainer_cli import PruningCLI, build
from lightning_prune.diffusion.pretrained import EMBEDDED
from lightning_prune.metrics.extractors.inception_weights import cached_file
from lightning_prune.protocols import InputError

_FILES = ("reference", "lpips_weights", "ckpt_path", "root")
_ASSETS = Path(__file__).parents[1] / "assets"


class _Parsed(Exception):
    """Carries a parsed configuration out of the command line before anything is built from it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config


class _ParsingCLI(PruningCLI):
    def before_instantiate_classes(self) -> None:
        config: dict[str, Any] = self.config[self.subcommand].as_dict()
        raise _Parsed(config)


def check(args: Sequence[str]) -> dict[str, Any]:
    """Check a command such as `fit --config x.yaml`. Returns its configuration as a nested dictionary.

    Raises:
        InputError: naming the key and the file that is missing here.
    """
    config = parse(args)
    run = {key: value for key, value in config.items() if key != "run"}
    for key, value in _leaves(run, ""):
        if missing := _missing(key, value):
            raise InputError(f"{key}: {missing}")
    return config


def parse(args: Sequence[str]) -> dict[str, Any]:
    """The configuration that `lightning_prune <args>` would run with."""
    methods.discover()
    argv, sys.argv = sys.argv, [sys.argv[0], *args]
    try:
        build(_ParsingCLI)
    except _Parsed as parsed:
        return parsed.config
    finally:
        sys.argv = argv
    raise AssertionError("the command line ended without a configuration")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every scalar of a nested configuration with its dotted key."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{key}.{index}")
    else:
        yield key, value


def _missing(key: str, value: Any) -> str | None:
    """What a value names that is not here, in words."""
    *folders, name = key.split(".")
    if not isinstance(value, str):
        return None
    if name == "weights" or (folders[-1:] == ["decoder"] and name == "pipeline"):
        return _missing_weights(value)
    if name == "extractor" and value == "inception" and not cached_file().exists():
        return f"{cached_file()} is missing; lightning_prune prefetch inception"
    artifact = name == "path" and {"denoiser", "teacher"} & set(folders)
    if (name in _FILES or "beside" in folders or artifact) and not Path(value).exists():
        return f"{value}: no such file or folder"
    return None


def _missing_weights(value: str) -> str | None:
    if value.startswith(EMBEDDED):
        found = (_ASSETS / value.removeprefix(EMBEDDED)).exists()
        return None if found else f"{value}: ships no such network"
    if Path(value).exists():
        return None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        cached = (try_to_load_from_cache(value, name) for name in ("config.json", "model_index.json"))
        found = any(isinstance(file, str) for file in cached)
        return None if found else f"{value}: not in the cache of the hub, which compute nodes cannot reach"
    return f"{value}: no such file or folder"
