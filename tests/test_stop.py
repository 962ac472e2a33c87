"""A run that a signal stops leaves a checkpoint at that step; resumed, it ends as if nothing had been."""

from __future__ import annotations

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from signal import SIGTERM, SIGUSR1, Signals, getsignal, raise_signal
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_prune import signals
from lightning_prune.callbacks import DistanceEvaluation, LastCheckpoint, MaskInvariant, SparsityRamp, StopOnSignal
from lightning_prune.cli import main
from lightning_prune.cli.errors import one_line_errors
from lightning_prune.cli.loggers import MetricsFile
from lightning_prune.signals import Stopped, listening, received
from tests.factories import fit, tiny_sparsedm

SMOKE = Path(__file__).parents[1] / "configs" / "smoke" / "sparsedm_dit.yaml"


class SignalAt(Callback):
    """Sends this process a signal at the start of a step or in the validation pass behind it."""

    def __init__(self, step: int, in_validation: bool = False, signum: Signals = SIGUSR1) -> None:
        self.step, self.in_validation, self.signum = step, in_validation, signum

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step and not self.in_validation:
            raise_signal(self.signum)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.step and self.in_validation:
            raise_signal(self.signum)


def run(folder: Path, ckpt_path: Path | None = None, *extra: Callback, steps: int = 6) -> Any:
    """Six steps of SparseDM with averaging, a ramp and a validation pass after every second; the module."""
    module = tiny_sparsedm(label_dropout=0.2, lr_schedule="cosine", decay=1e-3)
    callbacks = [
        SparsityRamp(["3:4", "2:4"], 0.5), MaskInvariant(), *extra, DistanceEvaluation(samples=20, steps=1),
        LastCheckpoint(100), StopOnSignal(),
    ]  # fmt: skip
    settings: Any = {
        "val_check_interval": 2,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
        "logger": MetricsFile(folder),
    }
    with listening():
        fit(module, folder, ckpt_path, max_steps=steps, callbacks=callbacks, enable_checkpointing=True, **settings)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    folder = tmp_path_factory.mktemp("whole")
    return run(folder), (folder / "metrics.csv").read_text()


@pytest.mark.parametrize(("step", "in_validation"), [(3, False), (4, False), (4, True)])
def test_resumed_equals_uninterrupted(step: int, in_validation: bool, whole: tuple[Any, str], tmp_path: Path) -> None:
    with pytest.raises(Stopped, match=f"SIGUSR1 at step {step}"):
        run(tmp_path, None, SignalAt(step, in_validation))
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step
    torch.manual_seed(12345)
    resumed = run(tmp_path, last)
    module, metrics = whole
    expected = module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())
    assert (tmp_path / "metrics.csv").read_text() == metrics


@pytest.mark.parametrize("second", [(4, True), (4, False), (5, False)])
def test_stopped_twice_and_resumed_equals_uninterrupted(
    second: tuple[int, bool], whole: tuple[Any, str], tmp_path: Path
) -> None:
    """The first time in a validation pass, which the run repeats, and counts as Lightning does."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    for number, stop in enumerate([(2, True), second]):
        with pytest.raises(Stopped, match=f"SIGUSR1 at step {stop[0]}"):
            run(tmp_path, last if number else None, SignalAt(*stop))
    resumed = run(tmp_path, last)
    module, metrics = whole
    expected = module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())
    assert (tmp_path / "metrics.csv").read_text() == metrics


def test_with_accumulated_gradients_a_run_is_left_between_optimizer_steps(tmp_path: Path) -> None:
    class Early(SignalAt):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                raise_signal(self.signum)

    module = tiny_sparsedm()
    callbacks = [Early(0), LastCheckpoint(100), StopOnSignal()]
    with listening(), pytest.raises(Stopped, match="at step 2"):
        fit(module, tmp_path, callbacks=callbacks, enable_checkpointing=True, accumulate_grad_batches=3)
    progress = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert progress["epoch_loop.batch_progress"]["total"]["processed"] == 6


def test_handlers_are_put_back_and_the_first_signal_counts() -> None:
    before = getsignal(SIGTERM), getsignal(SIGUSR1)
    with listening():
        assert received() is None
        raise_signal(SIGUSR1)
        raise_signal(SIGTERM)
        assert received() == SIGUSR1
    assert (getsignal(SIGTERM), getsignal(SIGUSR1)) == before
    assert received() is None


def test_the_status_is_that_of_the_signal(capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> int:
        raise Stopped("stopped by SIGTERM at step 3", SIGTERM)

    assert one_line_errors(stop, debug=False) == 143
    assert capsys.readouterr().err == "lightning_prune: stopped by SIGTERM at step 3\n"


def test_without_sigusr1_as_on_windows_runs_stop_on_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("signal.SIGUSR1")
    spec = spec_from_file_location("signals_of_windows", signals.__file__)
    assert spec is not None
    assert spec.loader is not None
    found = module_from_spec(spec)
    spec.loader.exec_module(found)  # beside the module that is in use
    with found.listening():
        raise_signal(SIGTERM)
        assert found.received() == found.STOP == SIGTERM


def test_a_stopped_run_writes_no_report_and_a_job_goes_on_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line, in an array task's environment, killed in its report."""
    for name, value in {"JOB_ID": "13", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3", "NTASKS": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "fit")
    monkeypatch.setenv("PATH", str(fake_scontrol(tmp_path)), prepend=os.pathsep)
    command = ["fit", "--config", str(SMOKE), "--run.root", str(tmp_path / "runs"), "--run.name", "x"]
    with monkeypatch.context() as patch:
        patch.setattr("lightning_prune.metrics.evaluation.Evaluator.score", _signal_and_score(patch))
        assert main(command) == 128 + SIGUSR1
    folder = tmp_path / "runs" / "x-12_3"
    assert (tmp_path / "asked").read_text() == "requeue 12_3\n"
    assert "job 12_3 is requeued" in capsys.readouterr().err
    assert not (folder / "report.json").exists()
    assert not (folder / "artifact").exists()
    (record,) = (folder / "wandb").glob("offline-run-*")
    assert main(command) == 2
    assert "holds a run already" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(command) == 0
    assert (folder / "report.json").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["x-12_3"]
    records = {p.name.rsplit("-", 1)[1] for p in (folder / "wandb").glob("offline-run-*")}
    assert records == {record.name.rsplit("-", 1)[1]}, "one W&B id over all starts"


def fake_scontrol(folder: Path) -> Path:
    file = folder / "bin" / "scontrol"
    file.parent.mkdir()
    file.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    file.chmod(0o755)
    return file.parent


def _signal_and_score(patch: pytest.MonkeyPatch) -> Any:
    from lightning_prune.metrics.evaluation import Evaluator

    score = Evaluator.score

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise_signal(SIGUSR1)
        return score(*args, **kwargs)

    return interrupted
