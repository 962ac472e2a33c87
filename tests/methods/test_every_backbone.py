"""Every method on every backbone: one batch of fit and a sample, or a refusal that is written down."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from itertools import product
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lightning_prune import methods
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.export import load, save_artifact
from lightning_prune.export.homogeneous import write_homogeneous
from lightning_prune.methods.mosaicdiff import MosaicDiff
from lightning_prune.methods.mosaicdiff.recipe import Recipe
from lightning_prune.methods.sparsedm import SparseDM
from lightning_prune.module import PruningModule
from lightning_prune.protocols import InputError
from tests.backbones import BACKBONES, Backbone, TinyData

PACKAGES = [
    import_module(f"{methods.__name__}.{found.name}") for found in iter_modules(methods.__path__) if found.ispkg
]
EXPORTED = [getattr(package, name) for package in PACKAGES for name in package.__all__]
METHODS = sorted((found for found in EXPORTED if issubclass(found, PruningModule)), key=lambda cls: cls.__name__)


def gates(backbone: Backbone) -> dict[str, Any]:
    """Settings of methods that search for gates."""
    unet = {"granularity": "coarse", "cache_mode": "output"} if backbone.component == "unet" else {}
    return {"sampler": backbone.sampler(), "budget": 0.75, "compare": [], **unet}


# A method needs an entry only where its defaults are too large for a tiny network.
SETTINGS: dict[str, Callable[[Backbone], dict[str, Any]]] = {
    "Dense": lambda backbone: {"label_dropout": 0.5},
    "SparseDM": lambda backbone: {"label_dropout": 0.5},
    "MosaicDiff": lambda backbone: {
        "sampler": backbone.sampler().name,
        "steps": 2,
        "target": 0.05,
        "recipe": Recipe(allocation="uniform", stages=1),
        "probe_images": 1,
    },
    "DiPGO": lambda backbone: gates(backbone),
    "GateRule": lambda backbone: {**gates(backbone), "search": "random-gates"},
}
REFUSALS = {
    (entry["family"], entry["method"]): entry["reason"]
    for entry in yaml.safe_load((Path(__file__).parents[1] / "refusals.yaml").read_text())
}


def _defaults(backbone: Backbone) -> dict[str, Any]:
    return {}


def build(method: Any, backbone: Backbone) -> Any:
    settings = SETTINGS.get(method.__name__, _defaults)
    denoiser = backbone.build()
    # Output layers start at zero in some families; nothing before them would get a gradient then.
    denoiser.network.load_state_dict(backbone.network().state_dict())
    return method(denoiser, backbone.process(), **settings(backbone))


def fit(module: PruningModule, backbone: Backbone, folder: Path) -> pl.Trainer:
    """Fit one batch."""
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=1, limit_val_batches=0, use_distributed_sampler=False,
        logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=TinyData(backbone, module.denoiser))
    return trainer


PAIRS = list(product(METHODS, BACKBONES))
NAMES = [f"{method.__name__}-{backbone.name}" for method, backbone in PAIRS]


def test_refusals_name_what_there_is() -> None:
    known = {(backbone.family.__name__, method.__name__) for method, backbone in PAIRS}
    assert set(REFUSALS) <= known


@pytest.mark.parametrize(("method", "backbone"), PAIRS, ids=NAMES)
def test_fits_a_batch_and_samples_or_says_why_not(method: Any, backbone: Backbone, tmp_path: Path) -> None:
    reason = REFUSALS.get((backbone.family.__name__, method.__name__))
    if reason is not None:
        with pytest.raises(InputError) as refusal:
            fit(build(method, backbone), backbone, tmp_path)
        assert reason in str(refusal.value)
        return
    module = build(method, backbone)
    trainer = fit(module, backbone, tmp_path)
    assert trainer.global_step == 1 or not module.automatic_optimization
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    networks = [variant.denoiser for variant in module.variants().values()]
    first, result = networks[0], networks[-1]
    ids, cond, sampler = torch.arange(2), backbone.condition(first, 2), backbone.sampler(guidance=2.0)
    images, dense = (sample_images(network, module.process, ids, cond, sampler) for network in (result, first))
    assert images.shape == (2, *result.sample_shape)
    assert torch.isfinite(images).all()
    assert method.__name__ == "Dense" or not torch.equal(images, dense)


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda b: b.name)
def test_an_artifact_of_stages_samples_like_the_networks_it_was_made_from(backbone: Backbone, tmp_path: Path) -> None:
    module = build(MosaicDiff, backbone)
    fit(module, backbone, tmp_path)
    stages = module.variants()[module.result_name].denoiser
    again = load(save_artifact(stages, tmp_path / "artifact", "mosaicdiff", {}))
    cond, ids, sampler = backbone.condition(module.denoiser, 2), torch.arange(2), backbone.sampler()
    stored = sample_images(again, module.process, ids, cond, sampler)
    torch.testing.assert_close(stored, sample_images(stages, module.process, ids, cond, sampler), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"stage 0 keeps .* a width that no configuration of .* has"):
        write_homogeneous(stages, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda b: b.name)
def test_a_masked_artifact_samples_like_the_network_it_was_made_from(backbone: Backbone, tmp_path: Path) -> None:
    module = build(SparseDM, backbone)
    folder = save_artifact(module.denoiser, tmp_path / "artifact", "sparsedm", {})
    again, cond = load(folder), backbone.condition(module.denoiser, 2)
    ids, sampler = torch.arange(2), backbone.sampler()
    stored = sample_images(again, module.process, ids, cond, sampler)
    # Kernels may sum in another order where memory lies otherwise.
    torch.testing.assert_close(stored, module.sample_images(ids, cond, sampler), rtol=1e-4, atol=1e-4)
    for name, layer in module.masks.layers.items():
        weight = again.network.get_parameter(f"{name}.weight")
        assert (weight == 0).float().mean() >= 0.5
        assert torch.equal(weight, layer.weight * layer.mask)
