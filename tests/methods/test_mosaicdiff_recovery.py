"""Slim stages trained for a few steps, from their artifact, through the command line."""

import json
from pathlib import Path

import pytest
import torch

from lightning_prune import load
from lightning_prune.cli import main
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.routing import StagedDenoiser
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.methods.mosaicdiff.recovery import Recovery
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.protocols import InputError
from tests.factories import tiny_dit

CONFIGS = Path(__file__).parents[2] / "configs" / "mosaicdiff"
REPORT = "--trainer.callbacks.init_args"
QUICK = (f"{REPORT}.samples=120", f"{REPORT}.steps=4", f"{REPORT}.timed_images=4", f"{REPORT}.timed_repeats=1")
PROCESS = Process(schedule="cosine", prediction="v")


def fit(config: Path, root: Path, *options: str) -> int:
    return main(["fit", "--config", str(config), "--run.root", str(root), "--data.batch_size=8", *options])


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a training-free run in two stages."""
    root = tmp_path_factory.mktemp("pruned")
    recipe = "--model.recipe={allocation: uniform, stages: 2}"
    options = ("--run.name=cut", "--model.steps=4", recipe, "--trainer.limit_train_batches=2", "--trainer.callbacks=[]")
    assert fit(CONFIGS / "fashion_dit.yaml", root, *options, "--model.rivals={}") == 0
    return root / "cut" / "artifact"


def test_stages_learn_and_stay_slim_and_shared(pruned: Path, tmp_path: Path) -> None:
    source = f"--model.denoiser.path={pruned}"
    steps = ("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.warmup_steps=1")
    few = ("--data.validation_samples=8", "--run.name=tuned")
    assert fit(CONFIGS / "fashion_dit_recovered.yaml", tmp_path, source, *steps, *few, *QUICK) == 0
    before, after = load(pruned), load(tmp_path / "tuned" / "artifact")
    assert isinstance(before, StagedDenoiser)
    assert isinstance(after, StagedDenoiser)
    shapes = [{name: p.shape for name, p in d.state_dict().items()} for d in (before, after)]
    assert shapes[0] == shapes[1]
    first, second = ({name for name, _ in d.named_parameters()} for d in (before, after))
    assert first == second, "what stages share they still share"
    changed = [n for n, p in before.state_dict().items() if not torch.equal(p, after.state_dict()[n])]
    assert {name.split(".")[1] for name in changed} == {"0", "1"}, "both stages learned"
    rows = {row["name"]: row for row in json.loads((tmp_path / "tuned" / "report.json").read_text())["rows"]}
    assert list(rows) == ["dense", "training-free", "recovered"]
    assert (
        rows["recovered"]["macs_per_image"] == rows["training-free"]["macs_per_image"] < rows["dense"]["macs_per_image"]
    )


def test_a_plan_counts_every_stage_and_says_that_widths_are_cut(
    pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, source = CONFIGS / "fashion_dit_recovered.yaml", f"--model.denoiser.path={pruned}"
    options = ["--config", str(config), source, "--trainer.callbacks.init_args.steps=4"]
    assert main(["plan", *options]) == 0
    assert "MosaicDiff widths   nothing: denoiser: its stages have been cut already" in capsys.readouterr().out
    assert main(["plan", "--json", *options]) == 0
    stages = load(pruned)
    cost = trajectory_cost(stages, PROCESS, Sampler("ddim", 4))
    assert len(cost.phases) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["sampling"]["macs_per_image"] == cost.macs()
    assert found["network"]["width_groups"] == {}


def test_the_loss_is_the_distance_from_the_teacher_by_stage(pruned: Path) -> None:
    stages = load(pruned)
    assert isinstance(stages, StagedDenoiser)
    teacher = tiny_dit()
    teacher.sample_shape, teacher.num_classes = stages.sample_shape, stages.num_classes
    module = Recovery(stages, PROCESS, teacher, ema_decay=None)
    batch = {"x": torch.randn(8, 1, 32, 32), "cond": torch.arange(8), "id": torch.arange(8)}
    first, again = (module.loss(batch, torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert torch.equal(first, again)
    first.backward()
    assert all(any(p.grad is not None for p in network.parameters()) for network in stages.networks)


def test_plms_makes_one_call_more_than_it_has_steps(pruned: Path) -> None:
    stages, teacher = load(pruned), tiny_dit()
    assert isinstance(stages, StagedDenoiser)
    teacher.sample_shape, teacher.num_classes = stages.sample_shape, stages.num_classes
    module = Recovery(stages, PROCESS, teacher, sampler="plms", ema_decay=None)
    assert module.predict_sampler == Sampler("plms", 3)
    assert len(module.visited) == stages.steps == 4
    module.check_sampler(Sampler("plms", 3))
    with pytest.raises(InputError, match="draws in 5 network calls"):
        module.check_sampler(Sampler("plms", 4))


def test_one_network_has_no_stages_to_recover(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no artifact of stages"):
        Recovery(tiny_dit(), PROCESS, tiny_dit())
    missing = f"--model.denoiser.path={tmp_path / 'nothing'}"
    assert fit(CONFIGS / "fashion_dit_recovered.yaml", tmp_path, missing) == 2
    assert "nothing" in capsys.readouterr().err.strip().splitlines()[-1]


def test_fewer_samples_than_stages_are_refused(pruned: Path) -> None:
    stages = load(pruned)
    teacher = tiny_dit()
    teacher.sample_shape, teacher.num_classes = stages.sample_shape, stages.num_classes
    module = Recovery(stages, PROCESS, teacher)
    batch = {"x": torch.randn(1, 1, 32, 32), "cond": torch.arange(1), "id": torch.arange(1)}
    with pytest.raises(InputError, match="1 samples for 2 stages"):
        module.loss(batch, torch.Generator())
