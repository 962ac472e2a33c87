"""One SLURM for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster, missing, running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    folder: Path = tmp_path_factory.mktemp("slurm")
    with running(folder) as started:
        yield started
