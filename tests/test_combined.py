"""One method on the artifact of another, through the command line: what goes together, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from lightning_prune import load
from lightning_prune.cli import main
from lightning_prune.cli.bench_networks import Task, load_pair
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.export import set_sparsity
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.pruning.masks import masked_layers, select_units

SMOKE = Path(__file__).parents[1] / "configs" / "smoke"


def loaded(artifact: Path) -> list[str]:
    """The options that put an artifact in the place of a config's own network."""
    return ["--model.denoiser=lightning_prune.load", f"--model.denoiser.path={artifact}"]


def fit(root: Path, name: str, config: str, *options: str, on: Path | None = None) -> int:
    """Fit a smoke config, on an artifact where one is given."""
    own = [] if on is None else loaded(on)
    return main(["fit", "--config", str(SMOKE / config), "--run.root", str(root), "--run.name", name, *own, *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts: switchable masks, gates over these, slim networks of one stage and two, and masks on the one."""
    root = tmp_path_factory.mktemp("made")
    assert fit(root, "masked", "sparsedm_dit.yaml", "--trainer.callbacks=[]") == 0
    checkpoint, switchable = root / "masked" / "checkpoints" / "last.ckpt", root / "switchable"
    written = ["--ckpt_path", str(checkpoint), "--output", str(switchable), "--format", "switchable"]
    assert main(["export", *written]) == 0
    for stages in (1, 2):
        options = (f"--model.recipe.stages={stages}", "--model.rivals={}", "--trainer.callbacks=[]")
        assert fit(root, f"slim-{stages}", "mosaicdiff_dit.yaml", *options) == 0
    assert fit(root, "gates", "dipgo_dit.yaml", on=switchable) == 0
    slim = root / "slim-1" / "artifact"
    assert fit(root, "slim-masked", "sparsedm_dit.yaml", "--trainer.callbacks=[]", on=slim) == 0
    return root


def test_gates_over_masks_cost_what_both_leave(made: Path) -> None:
    artifact = made / "gates" / "artifact"
    gates = json.loads((artifact / "gates.json").read_text())
    result, masked = load(artifact), load(made / "switchable")
    rows = {row["name"]: row for row in json.loads((made / "gates" / "report.json").read_text())["rows"]}
    process, sampler = Process("cosine", "v"), Sampler("ddim", gates["num_inference_steps"])
    assert rows["dense"]["macs_per_image"] == trajectory_cost(masked, process, sampler).macs()
    set_sparsity(masked, None)
    unmasked = trajectory_cost(masked, process, sampler).macs()
    assert rows["dense"]["macs_per_image"] < 0.8 * unmasked
    of_budgets = {name: row["macs_kept"] for name, row in rows.items() if name.startswith(("dipgo", "random-gates"))}
    assert len(of_budgets) == 4
    for name, kept in of_budgets.items():
        assert kept <= float(name.split()[-1])
    assert rows["dipgo 0.5"]["macs_kept"] == pytest.approx(gates["macs_kept"]["aten"])

    timed = load_pair(artifact, None, None).macs(Task(process, steps=sampler.steps))
    assert timed["ratio"] == pytest.approx(rows["dipgo 0.5"]["macs_per_image"] / float(unmasked))

    set_sparsity(masked, "2:4")
    zeros = {f"{name}.weight": layer.effective_weight() == 0 for name, layer in masked_layers(masked.network).items()}
    stored = dict(result.network.named_parameters())
    assert zeros
    assert all(torch.equal(stored[name] == 0, where) for name, where in zeros.items())


@pytest.mark.parametrize(
    ("source", "given", "format", "said"),
    [
        ("--artifact", "gates/artifact", "semi-structured", "slim stages and gated networks are not packed yet"),
        ("--artifact", "slim-masked/artifact", "semi-structured", "slim stages and gated networks are not packed yet"),
        ("--ckpt_path", "slim-masked/checkpoints/last.ckpt", "switchable", "masks of slim networks"),
    ],
)
def test_exports_that_would_lose_something_are_refused(
    source: str, given: str, format: str, said: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", source, str(made / given), "--output", str(made / "never"), "--format", format]) == 2
    assert said in capsys.readouterr().err
    assert not (made / "never").exists()


def test_plans_of_artifacts(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(SMOKE / "dipgo_dit.yaml")]
    assert main(["plan", "--json", *config, *loaded(made / "switchable")]) == 0
    planned = json.loads(capsys.readouterr().out)["sampling"]["macs_per_image"]
    rows = json.loads((made / "gates" / "report.json").read_text())["rows"]
    assert planned == rows[0]["macs_per_image"]
    assert main(["plan", *config, *loaded(made / "gates" / "artifact")]) == 2
    assert "it has gates already" in capsys.readouterr().err


def test_masks_on_one_slim_network(made: Path) -> None:
    before, after = load(made / "slim-1" / "artifact"), load(made / "slim-masked" / "artifact")
    assert {n: p.shape for n, p in before.named_parameters()} == {n: p.shape for n, p in after.named_parameters()}
    masked = {f"{unit.name}.weight" for unit in select_units(before.anatomy(), None, before.default_dense(), 4)}
    assert masked
    for name, weight in after.network.named_parameters():
        if name in masked:
            groups = weight.reshape(len(weight), -1, 4)
            assert ((groups == 0).sum(-1) >= 2).all(), name


@pytest.mark.parametrize(
    ("artifact", "config", "said"),
    [
        ("slim-2", "sparsedm_dit.yaml", "slim networks of 2 stages train by mosaicdiff.Recovery alone"),
        ("slim-2", "dense_dit.yaml", "slim networks of 2 stages train by mosaicdiff.Recovery alone"),
        ("gates", "sparsedm_dit.yaml", "it has gates already"),
        ("gates", "dense_dit.yaml", "it has gates already"),
        ("gates", "dipgo_dit.yaml", "it has gates already"),
        ("slim-1", "dipgo_dit.yaml", "describes no blocks"),
        ("slim-1", "mosaicdiff_dit.yaml", "its stages have been cut already"),
        ("gates", "mosaicdiff_dit.yaml", "it has gates already"),
        ("switchable", "sparsedm_dit.yaml", "of its layers have masks already"),
        ("switchable", "dense_dit.yaml", "of its layers have masks already"),
        ("switchable", "mosaicdiff_dit.yaml", "of its layers have masks already"),
    ],
)
def test_what_does_not_go_together_is_refused(
    artifact: str, config: str, said: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made / artifact
    assert fit(made, "refused", config, on=path / "artifact" if (path / "artifact").exists() else path) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (made / "refused").exists()
