"""`lightning_prune submit`: send a run to SLURM by the scripts in slurm/, after checking what can be checked here."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_prune.cli.export import build_module
from lightning_prune.cli.plan import describe
from lightning_prune.cli.preflight import check
from lightning_prune.diffusion.pretrained import without_weights
from lightning_prune.protocols import InputError

SCRIPTS = Path(__file__).parents[1] / "slurm"
_VARIABLES = {"time": "TIMELIMIT", "array": "ARRAY_INX"}
"""Where sbatch's variable is not named like its option."""


def run(args: Sequence[str]) -> int:
    """Parse `args`, check the run, and submit or print its script. Returns the exit status."""
    options, fit = _parser().parse_known_args(list(args))
    first, *further = options.config
    fit = [*(part for config in further for part in ("--config", config)), *fit]
    settings = check(["fit", "--config", first, *fit])
    with without_weights():
        describe(build_module(settings), settings, first)  # raises what the plan finds impossible
    env = _env(options.env)
    template = (SCRIPTS / "train.sbatch").read_text()
    directives = _directives(options, settings)
    script = render(template, directives, [first, *fit], env)
    if options.dry_run:
        print(script, end="")
        return 0
    print(f"submitted job {_submit(script, env, directives)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning_prune submit",
        description="Send `fit` to SLURM. Options that are not listed here are those of fit.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, action="append", metavar="FILE", help="config of fit; repeatable")
    parser.add_argument("--nodes", type=int, default=1, help="nodes")
    parser.add_argument("--devices", type=int, default=1, help="devices, and tasks, on a node")
    parser.add_argument("--time", help="time limit of one start, as sbatch takes it; the job requeues itself")
    parser.add_argument("--cpus-per-task", type=int, help="CPU cores a task")
    parser.add_argument("--partition", help="partition")
    parser.add_argument("--account", help="account")
    parser.add_argument("--qos", help="quality of service")
    parser.add_argument("--constraint", help="features of the nodes")
    parser.add_argument("--job-name", help="name of the job")
    parser.add_argument("--array", help="job array, for example 0-3: each task a run in a folder of its own")
    parser.add_argument("--env", type=Path, metavar="FILE", help="settings of the site; by default slurm/env.sh")
    parser.add_argument("--dry-run", action="store_true", help="print the script instead of submitting it")
    return parser


def _directives(options: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Options of sbatch by name; None removes the script's own."""
    for name in ("nodes", "devices"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: {getattr(options, name)} is not positive")
    gpus = None if settings["trainer"]["accelerator"] == "cpu" else str(options.devices)
    chosen: dict[str, str | None] = {
        "nodes": str(options.nodes), "ntasks-per-node": str(options.devices), "gpus-per-node": gpus,
    }  # fmt: skip
    for name in ("time", "cpus-per-task", "partition", "account", "qos", "constraint", "job-name", "array"):
        if (value := getattr(options, name.replace("-", "_"))) is not None:
            chosen[name] = str(value)
    return chosen


def render(script: str, directives: Mapping[str, str | None], arguments: Sequence[str], env: Path) -> str:
    """`script` with its #SBATCH lines replaced, added to or removed, its site settings and its arguments named.

    Args:
        script: text of an sbatch script.
        directives: long option names of sbatch with their values; None removes one.
        arguments: what the script would be given on the command line.
        env: file with the settings of the site.
    """
    lines = script.splitlines()
    own = [index for index, line in enumerate(lines) if line.startswith("#SBATCH ")]
    kept = [lines[index] for index in own if _name(lines[index]) not in directives]
    given = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    named = [f"export LIGHTNING_PRUNE_ENV={shlex.quote(str(env))}", f"set -- {shlex.join(arguments)}"]
    return "\n".join([*lines[: own[0]], *given, *kept, *named, *lines[own[-1] + 1 :]]) + "\n"


def _name(directive: str) -> str:
    match = re.match(r"#SBATCH --([\w-]+)", directive)
    assert match is not None
    return match[1]


def _env(given: Path | None) -> Path:
    """The site's settings: named, in the environment, in this folder, or those that ship with the package."""
    named = given or os.environ.get("LIGHTNING_PRUNE_ENV")
    if named is None:
        own = Path("slurm") / "env.sh"
        return (own if own.exists() else SCRIPTS / "env.sh").resolve()
    if not Path(named).is_file():
        raise InputError(f"--env: {named}: no such file")
    return Path(named).resolve()


def _submit(script: str, env: Path, asked: Collection[str]) -> str:
    """Hand the script to sbatch. Returns the job id."""
    if shutil.which("sbatch") is None:
        raise InputError("submit: there is no sbatch here; --dry-run prints the script")
    # The site's SBATCH_ variables prevail over a script's own lines, so those of what was asked for are taken away.
    variables = [f"SBATCH_{_VARIABLES.get(name, name.replace('-', '_').upper())}" for name in asked]
    command = f"source {shlex.quote(str(env))}; unset {' '.join(variables)}; exec sbatch --parsable"
    done = subprocess.run(["bash", "-c", command], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"sbatch: {done.stderr.strip() or f'ended with {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]
