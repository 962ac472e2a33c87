"""Artifacts whose pattern is chosen while they run: exact both ways, by step, and refused where masks are fixed."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

import lightning_prune
from lightning_prune.cli import main
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.export import save_artifact, set_sparsity, set_sparsity_by_step, switchable
from lightning_prune.export.artifact import MANIFEST
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.masks import MaskedLayer, effective_state
from tests.factories import tiny_dit, tiny_sparsedm

PROCESS = Process(schedule="cosine", prediction="v")
COND = torch.zeros(2, dtype=torch.long)


def stored(folder: Path, **arguments: Any) -> tuple[Path, Any]:
    """A switchable artifact, and the module it came from."""
    module = tiny_sparsedm(**arguments)
    copy = deepcopy(module.denoiser)
    return save_artifact(copy, folder / "artifact", "sparsedm", {switchable.KEY: switchable.released(copy)}), module


def output(denoiser: Denoiser) -> torch.Tensor:
    x = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = denoiser.eval()(x, torch.tensor([1, 500, 999]), torch.tensor([0, 4, 10]))
    return found


@pytest.mark.parametrize("pattern", [None, "2:4", "7:8", "1:4", {r".*\.ff\..*": "1:4", r".*\.attn1\..*": None}])
def test_any_pattern_is_that_of_the_training_module_and_goes_away_again(pattern: Any, tmp_path: Path) -> None:
    folder, module = stored(tmp_path)
    loaded = lightning_prune.load(folder)
    before = output(loaded)
    assert torch.equal(before, output(module.denoiser))
    set_sparsity(loaded, pattern)
    texts = pattern if isinstance(pattern, dict) else {".*": pattern}
    module.set_sparsity({name: None if text is None else Sparsity.parse(text) for name, text in texts.items()})
    assert torch.equal(output(loaded), output(module.denoiser))
    assert pattern == "2:4" or not torch.equal(output(loaded), before)
    set_sparsity(loaded, "2:4")
    assert torch.equal(output(loaded), before)


def test_layers_that_were_left_dense_can_be_masked_later(tmp_path: Path) -> None:
    module = tiny_sparsedm()
    module.set_sparsity({r".*\.ff\..*": None})
    copy = deepcopy(module.denoiser)
    folder = save_artifact(copy, tmp_path / "artifact", "sparsedm", {switchable.KEY: switchable.released(copy)})
    loaded = lightning_prune.load(folder)
    assert torch.equal(output(loaded), output(module.denoiser))
    set_sparsity(loaded, "2:4")
    module.set_sparsity(Sparsity(2, 4))
    assert torch.equal(output(loaded), output(module.denoiser))


def test_stored_are_the_dense_weights_which_diffusers_loads(tmp_path: Path) -> None:
    folder, module = stored(tmp_path)
    stock = DiTTransformer2DModel.from_pretrained(folder, use_safetensors=True).state_dict()
    assert all(torch.equal(stock[name], tensor) for name, tensor in module.denoiser.network.state_dict().items())
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["switchable"] == dict.fromkeys(module.masks.layers, "2:4")
    assert manifest["masks"] == {}


def test_a_pattern_by_step_is_that_of_each_step_and_costs_what_it_says(tmp_path: Path) -> None:
    switched = lightning_prune.load(stored(tmp_path)[0])
    masked = deepcopy(switched)
    set_sparsity_by_step(switched, [(0.0, "4:4"), (0.5, "2:4")])
    set_sparsity_by_step(switched, [(0.0, None), (0.5, "2:4")])
    assert type(switched).__name__ == "ByStepDiT"
    seen: list[str] = []
    layer: Any = next(m for m in switched.network.modules() if isinstance(m, MaskedLayer))

    def draw() -> torch.Tensor:
        seen.clear()
        look = lambda index: seen.append(str(layer.sparsity))  # noqa: E731
        return sample_images(switched, PROCESS, torch.arange(2), COND, Sampler(steps=5), on_step=look)

    first = draw()
    assert seen == ["None", "None", "None", "2:4", "2:4"]
    assert torch.equal(draw(), first), "a second trajectory begins dense again"
    assert seen[0] == "None"
    dense, pruned = (trajectory_cost(network, PROCESS, Sampler(steps=1)).macs() for network in (tiny_dit(), masked))
    assert trajectory_cost(switched, PROCESS, Sampler(steps=5)).macs() == 3 * dense + 2 * pruned


def test_one_pattern_for_every_step_ends_the_patterns_by_step(tmp_path: Path) -> None:
    denoiser = lightning_prune.load(stored(tmp_path)[0])
    before = output(denoiser)
    set_sparsity_by_step(denoiser, [(0.0, None), (0.5, "1:4")])
    sample_images(denoiser, PROCESS, torch.arange(2), COND, Sampler(steps=4))
    set_sparsity(denoiser, "2:4")
    assert type(denoiser).__name__ == "DiT"
    assert torch.equal(output(denoiser), before)
    sample_images(denoiser, PROCESS, torch.arange(2), COND, Sampler(steps=4))
    assert torch.equal(output(denoiser), before)


def test_half_precision_keeps_the_masks(tmp_path: Path) -> None:
    denoiser = lightning_prune.load(stored(tmp_path)[0]).eval()
    zeros = {name: tensor == 0 for name, tensor in effective_state(denoiser.network).items()}
    half = denoiser.to(torch.bfloat16)
    x, t, cond = torch.randn(2, 1, 32, 32).bfloat16(), torch.tensor([1, 500]), torch.tensor([0, 4])
    assert half(x, t, cond).dtype == torch.bfloat16
    for name, tensor in effective_state(half.network).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor == 0, zeros[name]), name


@pytest.mark.parametrize("starts", [[], [0.1], [0.0, 0.0], [0.0, 1.0]])
def test_patterns_by_step_begin_at_0_and_rise(starts: list[float], tmp_path: Path) -> None:
    denoiser = lightning_prune.load(stored(tmp_path)[0])
    with pytest.raises(InputError, match="have to begin at 0 and rise below 1"):
        set_sparsity_by_step(denoiser, [(start, None) for start in starts])


def test_patterns_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    denoiser = lightning_prune.load(stored(tmp_path)[0])
    before = output(denoiser)
    for pattern, message in (
        ("2:7", "sparsity 2:7"),
        ("half", "expected N:M"),
        ({"nothing": None}, "matches no layer"),
    ):
        with pytest.raises(InputError, match=message):
            set_sparsity(denoiser, pattern)
        assert torch.equal(output(denoiser), before)
    with pytest.raises(InputError, match="--format switchable"):
        set_sparsity(tiny_dit(), "2:4")


def test_masks_that_do_not_follow_from_weights_are_not_switched() -> None:
    module = tiny_sparsedm()
    module.masks.freeze()
    with pytest.raises(InputError, match=r"the mask of transformer_blocks.*does not follow from its weights alone"):
        switchable.released(module.denoiser)
    with pytest.raises(InputError, match="no layer is masked"):
        switchable.released(tiny_dit())


def test_a_layer_that_is_not_there_and_packing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = stored(tmp_path)
    packing = ["export", "--artifact", str(folder), "--format", "semi-structured", "--output", str(tmp_path / "out")]
    assert main(packing) == 2
    assert "holds no dense 2:4 layers to pack" in capsys.readouterr().err
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"switchable": {"nothing": "2:4"}}))
    with pytest.raises(InputError, match="switchable: nothing is no layer"):
        lightning_prune.load(folder)
