"""What samples are drawn for and how they are seen, and that classes are as they were."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.data import EmbeddedFashion
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.metrics import evaluation
from lightning_prune.metrics.drift import drift
from lightning_prune.metrics.evaluation import Evaluator, Measurement, SamplingSettings
from lightning_prune.metrics.samples import conditions_of, pictures_of, prompts_of, require_pictures
from lightning_prune.protocols import InputError, LatentData
from tests.backbones import BACKBONES, TinyData

FEW = Measurement(reference_samples=100)
BY_NAME = {backbone.name: backbone for backbone in BACKBONES}


def prompted(name: str = "pixart", samples: int = 4) -> TinyData:
    backbone = BY_NAME[name]
    return TinyData(backbone, backbone.build(), samples)


def test_the_prompt_of_a_sample_depends_on_its_id_alone() -> None:
    data = prompted()
    whole = conditions_of(data, torch.arange(10), 0)
    for ids in (torch.tensor([7]), torch.tensor([2, 9, 0]), torch.arange(10).flip(0)):
        part = conditions_of(data, ids, 0)
        assert all(torch.equal(part[key], whole[key][ids]) for key in whole)
    held_out = [sample["cond"] for sample in data.read("held_out").samples]
    for index in range(10):
        assert torch.equal(whole["prompt_embeds"][index], held_out[index % 4]["prompt_embeds"])


@pytest.mark.parametrize("data", [None, EmbeddedFashion(), prompted("dit")], ids=["none", "fashion", "tiny"])
def test_classes_are_balanced_as_before(data: Any) -> None:
    ids = torch.arange(37)
    assert conditions_of(data, ids, 10).tolist() == [index % 10 for index in range(37)]
    assert conditions_of(data, ids[5:9], 10).tolist() == [5, 6, 7, 8]
    assert torch.equal(conditions_of(data, ids, 0), torch.zeros(37, dtype=torch.long))
    assert prompts_of(data) is None
    assert pictures_of(data, REAL) is REAL
    require_pictures(data, "a test")


REAL = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_protocols_of_classes_have_the_hashes_they_had() -> None:
    """Rows of tables are paired by them: only fields that were there before, in the form they were hashed in."""
    protocol = Evaluator(EmbeddedFashion(), FEW).protocol(SamplingSettings(), Process(), "averaged")
    assert list(protocol.content()) == [
        "name", "samples", "sampler", "process", "steps", "guidance", "sample_seed", "extractor", "extractor_sha256",
        "reference", "reference_samples", "weights", "dtype", "resize", "rank_deficient", "interval",
    ]  # fmt: skip
    assert protocol.hash == hashlib.sha256(json.dumps(protocol.content(), sort_keys=True).encode()).hexdigest()[:12]
    assert protocol.hash == "54fe44d36033"


@dataclass
class Doubled:
    """A decoder that doubles; keeps how many it was given."""

    given: list[int] = field(default_factory=list)

    def to(self, device: Any) -> Doubled:
        return self

    def decode(self, latents: Tensor) -> Tensor:
        self.given.append(len(latents))
        return 2 * latents

    def describe(self) -> str:
        return "doubled"


class Halves(EmbeddedFashion):
    """Pictures halved, as latents."""

    decoder: Any = None

    def real_images(self, split: Any) -> Any:
        from lightning_prune.protocols import RealImages

        return RealImages(self.split(split).images, f"{self.name} {split} split")


def test_samples_are_decoded_before_they_are_compared_and_drift_is_of_latents() -> None:
    data, images = Halves(), EmbeddedFashion().split("held_out").images[:30] / 127.5 - 1
    data.decoder = Doubled()
    assert isinstance(data, LatentData)
    settings = SamplingSettings(30, Sampler(steps=2), batch_size=12, name="test")
    noise = 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    latent = Evaluator(data, FEW).score(
        {"dense": lambda ids, _: images[ids] / 2, "pruned": lambda ids, _: (images + noise)[ids] / 2},
        settings, Process(), "last",
    )  # fmt: skip
    plain = Evaluator(EmbeddedFashion(), FEW).score(
        {"dense": lambda ids, _: images[ids], "pruned": lambda ids, _: (images + noise)[ids]},
        settings, Process(), "last",
    )  # fmt: skip
    assert data.decoder.given == [12, 12, 12, 12, 6, 6]
    for name in ("dense", "pruned"):
        assert latent[name].fd.value == pytest.approx(plain[name].fd.value, rel=1e-6)
        assert latent[name].protocol.decoder == "doubled"
        assert latent[name].protocol.hash != plain[name].protocol.hash
    ours, theirs = latent["pruned"].drift, plain["pruned"].drift
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours.mse, theirs.mse / 4)
    torch.testing.assert_close(ours.psnr, theirs.psnr)


def test_drift_of_latents_needs_no_decoder() -> None:
    found = drift(REAL, REAL + 0.5)
    torch.testing.assert_close(found.mse, torch.full((4,), 0.25))


def test_latents_without_a_decoder_are_no_pictures() -> None:
    with pytest.raises(InputError, match=r"data\.decoder: a distance needs one"):
        Evaluator(Halves())
    with pytest.raises(InputError, match=r"data\.decoder"):
        pictures_of(Halves(), REAL)


class Sliced:
    """Pictures that are read when sliced, as those of a folder."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.largest = images, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: slice) -> Tensor:
        found = self.images[chosen]
        self.largest = max(self.largest, len(found))
        return found


@pytest.mark.parametrize("count", [None, 130])
def test_a_reference_read_in_parts_is_that_of_the_whole(count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    images = EmbeddedFashion().split("reference").images[:300]
    monkeypatch.setattr(evaluation, "_IMAGES_AT_ONCE", 64)
    sliced = Sliced(images)

    class Given(EmbeddedFashion):
        shown: Any = images

        def split(self, split: Any) -> Any:
            return type("Split", (), {"images": self.shown})()

    whole, parts = Given(), Given()
    parts.shown = sliced
    found, expected = (Evaluator(data, Measurement(reference_samples=count)) for data in (parts, whole))
    assert found._reference.data == expected._reference.data, "the same bytes, so the same name"
    assert found.reference.samples == expected.reference.samples == (count or 300)
    torch.testing.assert_close(found.reference.covariance, expected.reference.covariance)
    assert found.floor().value == pytest.approx(expected.floor().value, abs=1e-6)
    assert sliced.largest == 64
