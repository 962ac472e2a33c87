"""Properties of refitting layers in the order they run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.protocols import WidthGroup
from lightning_prune.pruning import recalibration
from lightning_prune.pruning.recalibration import recalibrate
from lightning_prune.pruning.structural import Width, slim
from tests.factories import tiny_dit, tiny_unet

FACTORIES: dict[str, Callable[[], Denoiser]] = {"transformer": tiny_dit, "unet": tiny_unet}


class Pair:
    """A dense network, a slim copy of half its units, and what both compute for the same samples."""

    def __init__(self, name: str) -> None:
        self.name, self.denoiser = name, FACTORIES[name]()
        for parameter in self.denoiser.parameters():  # adaptive norms and last layers begin at zero
            parameter.data += 0.05 * torch.randn_like(parameter)
        self.denoiser.eval().requires_grad_(False)
        self.dense: nn.Module = self.denoiser.network
        self.groups: list[WidthGroup] = list(self.denoiser.groups())
        self.slim = slim(self.dense, self.groups, {g.name: Width(tuple(range(g.units // 2))) for g in self.groups})
        self.x = torch.randn(32, *self.denoiser.sample_shape)
        self.t, self.cond = torch.arange(32) * 30, torch.arange(32) % 10

    def run(self, network: nn.Module, rows: slice = slice(None)) -> Tensor:
        self.denoiser.network = network
        output: Tensor = self.denoiser(self.x[rows], self.t[rows], self.cond[rows])
        return output

    def recalibrate(self, groups: list[WidthGroup], sizes: tuple[int, ...] = (20, 12), **options: Any) -> None:
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        run, run_dense = (lambda i, n=n: self.run(n, parts[i]) for n in (self.slim, self.dense))
        recalibrate(self.slim, run, self.dense, run_dense, len(parts), groups, **{"damping": 1e-6, **options})

    def outputs(self, network: nn.Module, group: WidthGroup) -> Tensor:
        """What the output layer of a group gives, channels last."""
        found: list[Tensor] = []
        handle = network.get_submodule(group.output).register_forward_hook(lambda m, a, out: found.append(out))
        self.run(network)
        handle.remove()
        return found[0].movedim(1, -1) if found[0].ndim == 4 else found[0]


@pytest.fixture(params=list(FACTORIES))
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def test_it_brings_predictions_nearer_to_the_dense_networks(pair: Pair) -> None:
    dense = pair.run(pair.dense)
    before = (pair.run(pair.slim) - dense).square().mean()
    pair.recalibrate(pair.groups, match="none")
    assert (pair.run(pair.slim) - dense).square().mean() < 0.8 * before


def test_the_order_is_that_of_the_call_not_that_of_the_list(pair: Pair) -> None:
    other = Pair(pair.name)
    pair.recalibrate(pair.groups)
    other.recalibrate(other.groups[::-1])
    assert torch.equal(pair.run(pair.slim), other.run(other.slim))


def test_batches_and_where_outputs_are_kept_change_nothing(pair: Pair, tmp_path: Path) -> None:
    other = Pair(pair.name)
    pair.recalibrate(pair.groups)
    other.recalibrate(other.groups, sizes=(32,), folder=tmp_path)
    # Sums in float32, in another order, solved with hardly any damping: 1e-4 apart on some numbers of threads.
    assert torch.allclose(pair.run(pair.slim), other.run(other.slim), atol=1e-3)
    assert not list(tmp_path.iterdir())


def test_what_is_held_does_not_grow_with_the_number_of_batches(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    refit = recalibration._refit

    def living() -> list[Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]

    others = {id(tensor) for tensor in living()} - {id(p) for p in pair.dense.parameters()}  # of whatever ran before

    def census(*arguments: Any) -> None:
        if not held:  # at the first layer the outputs of all others are kept
            held.append(sum(tensor.numel() for tensor in living() if id(tensor) not in others))
        refit(*arguments)

    monkeypatch.setattr(recalibration, "_refit", census)
    found = []
    for sizes, folder in (((4, 4), tmp_path), ((4,) * 8, tmp_path), ((4,) * 8, None)):
        pair.recalibrate(pair.groups, sizes=sizes, folder=folder)
        found.append(held.pop())
    few, many, in_memory = found
    # Views of the samples are counted, which are held either way.
    assert many - few < 0.1 * (in_memory - few), "neither outputs of the dense network nor what is replayed"


def test_every_layer_is_a_least_squares_fit_on_what_it_reads(pair: Pair) -> None:
    """No change of its bias lowers the error: residuals have no mean, also behind layers that were refitted."""
    pair.recalibrate(pair.groups, match="none")
    for group in pair.groups:
        wanted, found = (pair.outputs(n, group).flatten(0, -2) for n in (pair.dense, pair.slim))
        assert (wanted - found).mean(0).abs().max() < 1e-3 * wanted.std()
        assert (wanted - found).square().mean() < wanted.var()


def test_matched_outputs_vary_as_much_as_the_dense_ones(pair: Pair) -> None:
    pair.recalibrate(pair.groups, match="power")
    for group in pair.groups:
        wanted, found = (pair.outputs(n, group).flatten(0, -2) for n in (pair.dense, pair.slim))
        assert torch.allclose(found.mean(0), wanted.mean(0), atol=1e-4)
        power, aim = ((y - y.mean(0)).square().mean() for y in (found, wanted))
        assert float(power / aim) == pytest.approx(1, abs=1e-3)


def test_matched_outputs_follow_the_dense_ones_one_to_one(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recalibration, "_LOUDEST", 100.0)
    pair.recalibrate(pair.groups, match="gain")
    for group in pair.groups:
        wanted, found = (pair.outputs(n, group).flatten(0, -2) for n in (pair.dense, pair.slim))
        assert torch.allclose(found.mean(0), wanted.mean(0), atol=1e-4)
        wanted, found = wanted - wanted.mean(0), found - found.mean(0)
        assert float((wanted * found).mean() / wanted.square().mean()) == pytest.approx(1, abs=1e-3)


def test_a_layer_that_predicts_little_is_not_made_loud() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(500, 3).double(), torch.randn(500, 2).double()
    inputs = torch.cat([x, torch.ones(500, 1).double()], 1)
    before = torch.zeros(2, 4).double()
    moments = recalibration._Moments(inputs.T @ inputs, inputs.T @ y, y.sum(0), float(y.square().sum()))
    fitted = torch.linalg.solve(moments.inputs, moments.missing).T
    assert moments.wanted_variance > 10 * moments.covariance(fitted, before), "noise is not predicted"
    assert moments.scale(fitted, before, "gain") == moments.scale(fitted, before, "power") == 2.0
    assert moments.scale(before, before, "gain") == moments.scale(fitted, before, "none") == 1.0


def test_an_uncut_network_stays_as_it_is(pair: Pair) -> None:
    pair.slim = slim(pair.dense, pair.groups, {})
    before = pair.run(pair.dense)
    pair.recalibrate(pair.groups)
    assert torch.allclose(pair.run(pair.slim), before, atol=1e-4)


def test_dense_tensors_are_left_alone(pair: Pair) -> None:
    before = {name: p.clone() for name, p in pair.dense.named_parameters()}
    pair.recalibrate(pair.groups)
    assert all(torch.equal(p, before[name]) for name, p in pair.dense.named_parameters())
    assert not any(pair.dense.get_submodule(g.output)._forward_hooks for g in pair.groups)
    assert not any(pair.slim.get_submodule(g.output)._forward_pre_hooks for g in pair.groups)
