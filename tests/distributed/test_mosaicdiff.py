"""Statistics are summed over processes: two that see half of every batch know what one knows."""

from pathlib import Path

import pytest
import torch

from tests.distributed import test_two_processes as two

pytestmark = pytest.mark.distributed


def test_two_processes_sum_their_statistics(tmp_path: Path) -> None:
    smoke = two.SMOKE.with_name("mosaicdiff_dit.yaml")
    original, two.SMOKE = two.SMOKE, smoke
    try:
        run = two.run("fit", tmp_path, 2, "--run.wandb", "disabled", "--data.init_args.batch_size", "6")
    finally:
        two.SMOKE = original
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["mosaicdiff"]
    # 2 processes, 3 batches of 6 samples in 3 bins, 16 tokens each.
    assert state["rows"].tolist() == [[2 * 3 * 2 * 16.0] * 4] * 3
    for sums in state["sums"].values():
        assert torch.equal(sums[:, -1, -1], torch.full((3,), 2 * 3 * 2 * 16.0)), "the constant input counts rows"
    names = [row["name"] for row in two.report(run / "report.json")["rows"]]
    assert names[0] == "dense"
    assert names[-1] == "mosaicdiff measured"
