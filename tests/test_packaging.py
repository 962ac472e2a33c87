"""What is installed: one callbacks folder, a light command line, a complete wheel, pinned libraries."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lightning_prune

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_prune"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
HEAVY = {"torch", "lightning", "diffusers", "jsonargparse", "numpy", "wandb"}


def run_python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package_files() -> set[str]:
    """Every file below the package that is not a by-product, as it is named in a wheel."""
    found = set()
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        if Path(folder).name != "__pycache__":
            found |= {(Path(folder) / name).relative_to(ROOT).as_posix() for name in names}
    return found


def test_callbacks_are_one_folder_under_two_names() -> None:
    link = PACKAGE / "callbacks"
    assert link.readlink() == Path("../callbacks")
    assert link.samefile(ROOT / "callbacks")
    spec = importlib.util.find_spec("lightning_prune.callbacks")
    assert spec is not None
    assert Path(spec.origin or "").samefile(ROOT / "callbacks" / "__init__.py")


@pytest.mark.parametrize("arguments", [[], ["--version"], ["--help"]])
def test_import_version_and_help_load_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    call = f"from lightning_prune.cli import main; assert main({arguments}) == 0" if arguments else ""
    names = "print(*{name.partition('.')[0] for name in sys.modules})"
    printed = run_python("-c", f"import sys, lightning_prune\n{call}\n{names}", cwd=tmp_path)
    loaded = set(printed.splitlines()[-1].split())
    assert "lightning_prune" in loaded
    assert not loaded & HEAVY


def test_module_prints_its_version_from_any_folder(tmp_path: Path) -> None:
    printed = run_python("-m", "lightning_prune", "--version", cwd=tmp_path)
    assert printed == f"lightning_prune {lightning_prune.__version__}\n"


def test_console_script_names_a_function() -> None:
    assert PROJECT["scripts"] == {"lightning_prune": "lightning_prune.cli:main"}
    assert callable(pkgutil.resolve_name(PROJECT["scripts"]["lightning_prune"]))


BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel made from the sdist, built in a copy: leftovers of an older build would end up in it."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("lightning_prune", "callbacks", "slurm"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    run_python("-c", BUILD, "build_sdist", str(out), cwd=copy)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    run_python("-c", BUILD, "build_wheel", str(out), cwd=out / sdist.name.removesuffix(".tar.gz"))
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    metadata = f"lightning_prune-{lightning_prune.__version__}.dist-info/"
    packed = {name for name in wheel.namelist() if not name.startswith(metadata)}
    assert packed == package_files()
    assert any(name.startswith("lightning_prune/assets/") and name.endswith(".npz") for name in packed)
    assert "lightning_prune/callbacks/__init__.py" in packed


def test_wheel_declares_script_version_and_licence(wheel: zipfile.ZipFile) -> None:
    metadata = f"lightning_prune-{lightning_prune.__version__}.dist-info"
    assert "lightning_prune = lightning_prune.cli:main" in wheel.read(f"{metadata}/entry_points.txt").decode()
    assert wheel.read(f"{metadata}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_constraints_pin_every_requirement_within_its_bound() -> None:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines if line]
    assert None not in pins
    pinned = {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}
    requirements = [Requirement(text) for text in PROJECT["dependencies"] + EXTRAS["dev"]]
    outside = [str(r) for r in requirements if pinned.get(canonicalize_name(r.name), "0.dev0") not in r.specifier]
    assert outside == []
