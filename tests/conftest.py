"""What every test shares: two cores, no network, no tracking server, no records outside its folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

# Set before torch and huggingface_hub are imported, which read them once; subprocesses of tests inherit them.
# `make test` runs two workers, which share the two cores.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
# Threads that wait give the core away: on a machine that does other things too, spinning makes tests many times slower.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"


@pytest.fixture(scope="session", autouse=True)
def _wandb_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(variable, str(root))
        yield


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests prefetch and cache is theirs alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def prefetched() -> None:
    """Inception's weights in that cache, as `lightning_prune prefetch inception` puts them there."""
    from lightning_prune.cli import main

    assert main(["prefetch", "inception"]) == 0


@pytest.fixture(autouse=True)
def _no_rank_is_left_behind() -> Iterator[None]:
    """A strategy set up in this process writes its place into the environment.

    With a LOCAL_RANK there, the processes of a later test would believe that somebody else starts the others, and wait.
    """
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _lightning_logs_to_pytest_alone() -> None:
    # Lightning ties a handler to the stderr of the moment it is imported, which pytest has closed by now.
    logging.getLogger("lightning").handlers.clear()
