"""FID through our extractor against FID through the independent TorchScript copy, and torchmetrics' printed figures.

`PARITY_IMAGES` sets the number of real and of generated images; 500 is what is claimed.
"""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.kid import KernelInceptionDistance

import lightning_prune
from lightning_prune.data import EmbeddedFashion
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.metrics.extractors.inception import InceptionExtractor, build_network
from lightning_prune.metrics.extractors.inception_weights import read_weights
from lightning_prune.metrics.frechet import Moments, frechet_distance
from lightning_prune.metrics.kid import kernel_distance
from lightning_prune.pixels import to_uint8
from tests.inception import oracle_features, weights_in

pytestmark = [pytest.mark.parity, pytest.mark.timeout(3600)]
IMAGES = int(os.environ.get("PARITY_IMAGES", "500"))
ASSETS = Path(lightning_prune.__file__).parent / "assets"


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_in(tmp_path_factory.mktemp("inception"))


def generated(count: int) -> Tensor:
    """Images of the embedded transformer, DDIM-10."""
    denoiser, process = lightning_prune.load(ASSETS / "fashion_dit"), Process(schedule="cosine", prediction="v")
    ids = torch.arange(count)
    drawn = [sample_images(denoiser, process, part, part % 10, Sampler(steps=10)) for part in ids.split(100)]
    return to_uint8(torch.cat(drawn)).expand(-1, 3, -1, -1)


def test_fid_is_that_of_the_independent_copy(inception_file: Path) -> None:
    """The copy's side is independent throughout: resize, network, and torch-fidelity's general eigenvalues."""
    real = EmbeddedFashion().split("reference").images[:IMAGES].expand(-1, 3, -1, -1)
    fake = generated(IMAGES)
    extractor = InceptionExtractor(inception_file)
    ours = frechet_distance(*(Moments.of(extractor.extract(images).features) for images in (fake, real)))
    theirs = [fid_features_to_statistics(oracle_features(images)) for images in (fake, real)]
    assert ours == pytest.approx(fid_statistics_to_metric(*theirs, verbose=False)[KEY_METRIC_FID], abs=1e-3)


@pytest.fixture
def printed_example(inception_file: Path) -> tuple[Tensor, Tensor]:
    """The images of the examples in torchmetrics' documentation.

    Its documentation tests seed with 42, and building the network draws from the same generator before the images do.
    """
    tensors = read_weights(inception_file)
    torch.manual_seed(42)
    build_network(tensors, ["2048"])
    shape = (100, 3, 299, 299)
    return torch.randint(0, 200, shape, dtype=torch.uint8), torch.randint(100, 255, shape, dtype=torch.uint8)


def test_fid_of_64_features_as_printed_by_torchmetrics(
    inception_file: Path, printed_example: tuple[Tensor, Tensor]
) -> None:
    extractor = InceptionExtractor(inception_file, layer="64")
    first, second = (Moments.of(extractor.extract(images).features) for images in printed_example)
    assert frechet_distance(first, second) == pytest.approx(12.6388, abs=1e-3)


def test_kid_as_printed_by_torchmetrics(inception_file: Path, printed_example: tuple[Tensor, Tensor]) -> None:
    """torchmetrics on our features draws the subsets it drew in the example; all pairs estimate the same number."""
    with pytest.warns(UserWarning, match="buffer"):
        torchmetrics = KernelInceptionDistance(torch.nn.Identity(), subset_size=50)
    generator_state = torch.get_rng_state()
    extractor = InceptionExtractor(inception_file)
    first, second = (extractor.extract(images).features for images in printed_example)
    torch.set_rng_state(generator_state)
    torchmetrics.update(first, real=True)
    torchmetrics.update(second, real=False)
    mean, deviation = torchmetrics.compute()
    assert float(mean) == pytest.approx(0.0312, abs=1e-4)
    assert float(deviation) == pytest.approx(0.0025, abs=1e-4)
    assert kernel_distance(second, first).value == pytest.approx(float(mean), abs=3 * float(deviation) / 10)
