"""The progress line reads values, which waits for the device, by time and at the end, not at every step."""

from pathlib import Path
from typing import Any

import pytest

from lightning_prune.callbacks.progress import StepProgress
from tests.factories import fit, tiny_sparsedm


class Read(StepProgress):
    """Counts readings; keeps what stood in the line at the end, and the last loss."""

    readings = 0
    line, loss = "", ""

    def _show_values(self, trainer: Any) -> None:
        self.readings += 1
        super()._show_values(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, *rest)
        self.loss = f"loss {float(outputs['loss']):.3g}"

    def _stop(self) -> None:
        if self._progress is not None:
            (task,) = self._progress.tasks
            self.line, self.done = task.fields["values"], task.completed
        super()._stop()


@pytest.mark.parametrize(("seconds", "readings"), [(0.0, 2), (1.0, 6)])
def test_values_are_read_by_time_and_are_exact_at_the_end(
    seconds: float, readings: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += seconds
        return now

    monkeypatch.setattr("lightning_prune.callbacks.progress.time.monotonic", clock)
    bar = Read()
    fit(tiny_sparsedm(distill_weight=0), tmp_path, max_steps=5, callbacks=[bar], enable_progress_bar=True)
    assert (bar.readings, bar.done) == (readings, 5)
    assert bar.loss in bar.line
