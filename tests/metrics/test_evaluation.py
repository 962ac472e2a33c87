"""Scoring: pairing, drift, other extractors' names, external references, and what is refused."""

from pathlib import Path

import pytest
import torch

from lightning_prune.data import EmbeddedFashion
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.metrics import features
from lightning_prune.metrics.evaluation import Draw, Evaluator, Measurement, SamplingSettings
from lightning_prune.metrics.frechet import Distance
from lightning_prune.metrics.reference import compute_reference, export_pytorch_fid, save_reference
from lightning_prune.pixels import to_unit_range
from lightning_prune.protocols import InputError

SETTINGS = SamplingSettings(samples=120, sampler=Sampler(steps=2), batch_size=50, name="test")
PROCESS = Process()
DATA = EmbeddedFashion()
REAL = to_unit_range(DATA.split("held_out").images[:200])


def real(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return REAL[ids]


def noisy(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    noise = torch.stack([torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(int(i))) for i in ids])
    return (REAL[ids] + 0.3 * noise).clamp(-1, 1)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(DATA, Measurement(further=["kernel", "precision_recall", "inception_score"]))


def score(evaluator: Evaluator, **draws: Draw) -> dict:  # type: ignore[type-arg]
    return evaluator.score(draws, SETTINGS, PROCESS, "last")


def test_a_second_network_is_compared_image_by_image(evaluator: Evaluator) -> None:
    scores = score(evaluator, dense=real, same=real, pruned=noisy)
    assert scores["dense"].drift is None
    assert float(scores["same"].drift.mse.max()) == 0
    assert float(scores["pruned"].drift.psnr.max()) < 20
    assert scores["pruned"].fd.low > scores["dense"].fd.high
    assert len({s.protocol.hash for s in scores.values()}) == 1


def test_further_measures_have_their_own_names(evaluator: Evaluator) -> None:
    found = score(evaluator, dense=real, pruned=noisy)
    for name in ("kd_fashion", "inception_score"):
        assert isinstance(found["dense"].further[name], Distance)
    assert found["dense"].further["kd_fashion"].value < found["pruned"].further["kd_fashion"].low
    assert found["dense"].further["precision"] > found["pruned"].further["precision"]
    with pytest.raises(InputError, match="no spatial features"):
        score(Evaluator(DATA, Measurement(further=["spatial"])), dense=real)


def test_moments_from_a_file_give_the_same_distance(evaluator: Evaluator, tmp_path: Path) -> None:
    images = DATA.split("reference").images
    reference = compute_reference(evaluator.extractor, images, "the reference split")
    save_reference(reference, tmp_path / "ours.npz")
    export_pytorch_fid(reference, tmp_path / "theirs.npz")
    expected = score(evaluator, dense=real)["dense"]
    for name, samples in (("ours", None), ("theirs", len(images))):
        external = Evaluator(DATA, Measurement(reference=str(tmp_path / f"{name}.npz"), reference_samples=samples))
        found = score(external, dense=real)["dense"]
        assert found.fd.value == pytest.approx(expected.fd.value, rel=1e-9)
        assert found.protocol.hash != expected.protocol.hash, "what it was compared with is part of the protocol"
    with pytest.raises(InputError, match=r"theirs\.npz: does not say how many"):
        score(Evaluator(DATA, Measurement(reference=str(tmp_path / "theirs.npz"))), dense=real)
    with pytest.raises(InputError, match="needs reference images"):
        score(Evaluator(DATA, Measurement(reference=str(tmp_path / "ours.npz"), further=["kernel"])), dense=real)


def test_too_few_samples_for_the_dimensions_are_marked(evaluator: Evaluator) -> None:
    few = SamplingSettings(samples=40, sampler=Sampler(steps=2), name="test")
    features._warned().clear()  # it is said once a process, and another test may have been told
    with pytest.warns(UserWarning, match="rank deficient"):
        found = Evaluator(DATA).score({"dense": real}, few, PROCESS, "last")["dense"]
    assert found.protocol.rank_deficient
    assert not score(evaluator, dense=real)["dense"].protocol.rank_deficient


def test_broken_images_and_counts_are_refused(evaluator: Evaluator) -> None:
    with pytest.raises(InputError, match="not finite"):
        score(evaluator, dense=lambda ids, labels: REAL[ids] * float("nan"))
    with pytest.raises(InputError, match="samples: 1"):
        SamplingSettings(samples=1)
    with pytest.raises(InputError, match="fashion_classifier takes"):
        score(evaluator, dense=lambda ids, labels: REAL[ids][..., :16])
