"""The command line. This entry answers --help and --version itself, so neither pays for importing torch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_prune import __version__
from lightning_prune.signals import listening

HELP = """\
usage: lightning_prune [--help] [--version] [--debug] <verb> [options]

Make pretrained diffusion models cheaper to sample.

  fit        train, prune or search as a config says; leaves runs/<name>/ with report and artifact
  validate   one validation pass of a config and checkpoint
  test       evaluate a config and checkpoint on held-out data
  predict    draw images for held-out labels
  plan       what a config would do, from shapes alone: reach, cost, memory; without weights or GPU
  export     turn a checkpoint into an artifact, or an artifact's 2:4 layers into semi-structured ones
  bench      time an artifact against the dense network, in one interleaved measurement
  cache-latents  encode pictures and captions once, for training without autoencoder and text encoders
  prefetch   put weights that evaluation needs into the cache: prefetch inception [--from PATH]
  pareto     one table over the reports of many runs, a sweep's for one: pareto runs/
  submit     check a config and send its fit to SLURM: submit --config x.yaml --nodes 2 [--dry-run]

  lightning_prune fit --config configs/quickstart.yaml
  lightning_prune fit --config x.yaml --print_config      the complete, reusable config
  lightning_prune fit --config x.yaml --run.wandb online  the same run, tracked online
  lightning_prune fit --help                              every option of fit

Exit status: 0 done, 1 a defect of ours, 2 bad input or impossible request, 3 a quality gate (--gate) not met.
A run stopped by a signal ends with 128 + its number. --debug shows the traceback behind a one-line error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if args else 2
    if args[0] == "--version":
        print(f"lightning_prune {__version__}")
        return 0
    _through_srun(args)
    if args[0] != "fit":
        return _one_line(args, debug)
    # Before the imports that take seconds: SLURM may ask a job to stop that has hardly begun.
    with listening():
        return _one_line(args, debug)


def _one_line(args: Sequence[str], debug: bool) -> int:
    from lightning_prune.cli.errors import one_line_errors

    return one_line_errors(lambda: _dispatch(args), debug)


def _through_srun(args: Sequence[str]) -> None:
    """Become `srun` of this command where a batch script asks for it: agents of a sweep start one process a trial."""
    srun = os.environ.get("LIGHTNING_PRUNE_SRUN")
    if not srun or "SLURM_JOB_ID" not in os.environ or "SLURM_STEP_ID" in os.environ or args[0] != "fit":
        return
    size = ["--trainer.num_nodes", os.environ["SLURM_JOB_NUM_NODES"]]
    size += ["--trainer.devices", os.environ["SLURM_NTASKS_PER_NODE"]]
    command = [*shlex.split(srun), sys.executable, "-m", "lightning_prune", *args, *size]
    os.execvp(command[0], command)


def _dispatch(args: Sequence[str]) -> int:
    # Verbs that need no trainer are modules with a `run` of their own; everything else is Lightning's.
    verbs = ("export", "plan", "bench", "cache-latents", "pareto", "prefetch", "submit")
    module = args[0].replace("-", "_") if args[0] in verbs else "trainer_cli"
    status: int = import_module(f"lightning_prune.cli.{module}").run(args if module == "trainer_cli" else args[1:])
    return status
