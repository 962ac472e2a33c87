"""fit, validate, test and predict: Lightning's command line over `PruningModule` and any data module."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import wandb
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_prune.callbacks
import lightning_prune.data  # noqa: F401
from lightning_prune import jobs, methods
from lightning_prune.callbacks import (
    ArtifactWriter,
    EfficiencyReport,
    ImageWriter,
    LastCheckpoint,
    RunRecord,
    StepProgress,
    StopOnSignal,
)
from lightning_prune.cli import run_folder
from lightning_prune.cli.checkpoints import check_checkpoint
from lightning_prune.cli.errors import input_error_behind
from lightning_prune.cli.loggers import run_loggers
from lightning_prune.cli.run_folder import RunSettings
from lightning_prune.metrics.extractors import load_extractor
from lightning_prune.metrics.gate import Gate
from lightning_prune.module import PruningModule
from lightning_prune.protocols import InputError


class PruningCLI(LightningCLI):
    """Lightning's command line with a run folder, loggers and checkpoints of its own."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunSettings, "run")
        parser.add_argument(
            "--gate",
            type=str | None,
            default=None,
            help="condition on the result, for example 'fd_fashion<=dense+0.5'; status 3 if it does not hold",
        )

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.trainer.default_root_dir is not None:
            raise InputError("trainer.default_root_dir: the folder of a run is run.root and run.name")
        self.settings = RunSettings(**vars(config.run))
        self.gate = Gate.parse(config.gate) if config.gate else None
        self.folder = run_folder.resolve(self.settings, config.get("ckpt_path"))

    def before_fit(self) -> None:
        self._resume_job()
        self._check_checkpoint()
        self._check_gate()
        # W&B falls back to a temporary folder if this one does not exist when it starts.
        run_folder.create(self.folder)

    def _resume_job(self) -> None:
        """Another start of a job goes on with its run. The recorded configuration is that of every start."""
        config = self.config_init[self.subcommand]
        if config.get("ckpt_path") is None and (checkpoint := run_folder.checkpoint_to_resume(self.folder)):
            config["ckpt_path"] = str(checkpoint)

    def before_validate(self) -> None:
        self._check_checkpoint()
        if self.gate:
            raise InputError("gate: only fit and test measure what a gate asks for")

    before_predict = before_validate

    def before_test(self) -> None:
        self._check_checkpoint()
        self._check_gate()

    def after_fit(self) -> None:
        path = self.config_init[self.subcommand].get("ckpt_path")
        if path is not None and not (self.folder / "artifact").exists():
            self._finish(Path(path))
        self._check_result()

    def _finish(self, checkpoint: Path) -> None:
        """Results of a run that was stopped between its last step and its report: the trainer has nothing to do."""
        self.model.load_state_dict(check_checkpoint(checkpoint, self.model)["state_dict"])
        self.model.write_results(self.trainer)

    def after_test(self) -> None:
        self._check_result()

    def _check_result(self) -> None:
        if self.gate and self.trainer.is_global_zero:
            print(f"gate met: {self.gate.check(self._report_callback().scores)}")

    def _check_gate(self) -> None:
        """A condition that cannot be checked is refused before the work, not after."""
        if self.gate:
            report = self._report_callback()
            metric = load_extractor(report.measurement.extractor, report.measurement.weights).metric
            self.gate.check_names(metric, report.row_names(self.model))

    def _report_callback(self) -> EfficiencyReport:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EfficiencyReport):
                return callback
        raise InputError("gate: trainer.callbacks holds no EfficiencyReport, so nothing is measured")

    def _check_checkpoint(self) -> None:
        path = self.config_init[self.subcommand].get("ckpt_path")
        if path is not None:
            check_checkpoint(Path(path), self.model)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self._get(self.config_init, "trainer", default={})
        return super().instantiate_trainer(
            **{
                "default_root_dir": str(self.folder),
                "logger": self._loggers(config.get("logger")),
                "callbacks": [*(config.get("callbacks") or []), *self._standing_callbacks(config)],
                "plugins": _plugins(config.get("plugins")),
                **kwargs,
            }
        )

    def _loggers(self, given: Any) -> Any:
        if given is not None:
            return given
        return run_loggers(self.settings, self.folder) if self.subcommand == "fit" else False

    def _standing_callbacks(self, config: Any) -> list[Callback]:
        given = config.get("callbacks") or []
        callbacks: list[Callback] = []
        if self.subcommand == "fit":
            callbacks += [RunRecord(self._resolved()), ArtifactWriter()]
        if self.subcommand == "predict" and not any(isinstance(c, ImageWriter) for c in given):
            callbacks.append(ImageWriter())
        if config.get("enable_progress_bar") is not False:
            callbacks.append(StepProgress())
        if self.subcommand == "fit" and config.get("enable_checkpointing") is not False:
            callbacks += [LastCheckpoint(self.settings.checkpoint_every), StopOnSignal()]
        return callbacks

    def _resolved(self) -> str:
        """The complete configuration of this verb, a file that `--config` reads back."""
        parser = self._parser(self.subcommand)
        config = self.config[self.subcommand].clone()
        config.pop("config", None)
        text: str = parser.dump(config, skip_none=False)
        return text


def _plugins(given: Any) -> Any:
    """The given plugins, and under SLURM an environment that leaves stopping and requeueing to `StopOnSignal`.

    Lightning's own saves inside a signal handler, where processes of different steps wait for each other for ever
    (issue 21406 of its repository).
    """
    plugins = given if isinstance(given, list) else [given] if given else []
    if jobs.in_slurm() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        plugins = [*plugins, SLURMEnvironment(auto_requeue=False)]
    return plugins or None


def build(cli: type[PruningCLI]) -> None:
    """Parse `sys.argv` and run the verb it names."""
    cli(
        PruningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        seed_everything_default=0,
        parser_kwargs={"exit_on_error": False, "prog": "lightning_prune"},
        args=None,
    )


def run(args: Sequence[str]) -> int:
    """Parse `args` and run the verb. Returns the exit status."""
    os.environ.setdefault("WANDB_SILENT", "true")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    torch.set_flush_denormal(True)
    if jobs.outside_srun():
        raise InputError(f"SLURM_NTASKS is {os.environ['SLURM_NTASKS']}, but this was started without srun: no peers")
    if args[0] != "fit":
        # Averaging is for training: a checkpoint's `state_dict` holds the averaged weights already.
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used to create")
    methods.discover()
    # Lightning's launcher starts further processes from sys.argv, so the program's own name has to stay.
    argv, sys.argv = sys.argv, [sys.argv[0], *args]
    try:
        build(PruningCLI)
    except BaseException as error:
        wandb.finish(exit_code=1)
        if input_error_behind(error):
            run_folder.discard_unused()
        raise
    finally:
        wandb.finish()
        sys.argv = argv
        run_folder.forget()
    return 0
