"""What a report compares: costs relative to the dense network, and the control with fewer steps."""

from copy import deepcopy
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_prune.callbacks import EfficiencyReport
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.diffusion.variants import Variant
from lightning_prune.export import report
from lightning_prune.export.report import costs, with_fewer_steps
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.protocols import Sparsity
from lightning_prune.pruning.masks import MaskSet, baked, effective_state, masked_layers, select_units
from tests.factories import tiny_dit

PROCESS, SAMPLER = Process("cosine", "v"), Sampler(steps=20)


def variants(sparsity: Sparsity | None) -> dict[str, Variant]:
    dense = tiny_dit()
    masked = deepcopy(dense)
    MaskSet(masked.network, select_units(masked.anatomy(), None, masked.default_dense(), 4), sparsity)
    return {"dense": Variant(dense), "result": Variant(masked)}


def test_costs_are_relative_to_the_first_network() -> None:
    found = costs(variants(Sparsity(2, 4)), PROCESS, SAMPLER)
    assert found["dense"].macs_kept == 1
    assert found["dense"].masked_share == 0
    expected = 1 - found["result"].masked_share / 2
    assert found["result"].macs_kept == pytest.approx(expected)
    assert found["result"].nonzero_parameters < found["result"].parameters == found["dense"].parameters


@pytest.mark.parametrize(("units", "steps"), [(0, 10), (1, 10), (40, 9)])
def test_fewer_steps_cost_as_much_as_a_result_that_is_a_little_below_its_budget(
    units: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a run of 20 steps is 10 of them, though the result be a unit below; not if it is a whole percent."""
    given = variants(None)
    whole = trajectory_cost(given["dense"].denoiser, PROCESS, SAMPLER).macs()

    def cost(denoiser: Denoiser, process: Process, sampler: Sampler) -> Any:
        share = Fraction(1, 2) - Fraction(units, 4000) if denoiser is given["result"].denoiser else Fraction(1)
        return SimpleNamespace(macs=lambda: whole * share * sampler.steps / 20)

    monkeypatch.setattr(report, "trajectory_cost", cost)
    assert f"dense, {steps} steps" in with_fewer_steps(given, PROCESS, SAMPLER)


def test_fewer_steps_cost_no_more_than_the_result_and_less_than_a_step_below() -> None:
    given = variants(Sparsity(2, 4))
    compared = with_fewer_steps(given, PROCESS, SAMPLER)
    *_, control, last = compared
    assert last == "result"
    own = compared[control].sampler
    assert own is not None
    assert control == f"dense, {own.steps} steps"
    assert compared[control].denoiser is given["dense"].denoiser
    found = costs(compared, PROCESS, SAMPLER)
    a_step = found["dense"].macs_per_image / 20
    assert 0 <= found["result"].macs_per_image - found[control].macs_per_image < a_step


def test_a_solver_of_one_call_more_than_steps_costs_no_more_than_the_result_either() -> None:
    sampler = Sampler("plms", 20)
    compared = with_fewer_steps(variants(Sparsity(2, 4)), PROCESS, sampler)
    *_, control, _ = compared
    found = costs(compared, PROCESS, sampler)
    assert compared[control].sampler is not None
    assert 0 <= found["result"].macs_per_image - found[control].macs_per_image < found["dense"].macs_per_image / 21


def test_nothing_saved_leaves_all_steps() -> None:
    assert "dense, 20 steps" in with_fewer_steps(variants(None), PROCESS, SAMPLER)


def test_a_baked_copy_holds_its_zeros_and_shares_what_no_mask_changes() -> None:
    given = variants(Sparsity(2, 4))
    for name, variant in given.items():
        network, copy = variant.denoiser.network, baked(variant.denoiser).network
        expected, before = effective_state(network), {n: t.clone() for n, t in network.state_dict().items()}
        masked = {f"{layer}.weight" for layer in masked_layers(network)}
        assert bool(masked) == (name == "result")
        for key, tensor in copy.state_dict().items():
            assert torch.equal(tensor, expected[key])
            assert (tensor.data_ptr() == network.state_dict()[key].data_ptr()) == (key not in masked)
        assert not masked_layers(copy)
        assert len(masked_layers(network)) == len(masked)
        assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())
        assert {p.requires_grad for p in copy.parameters()} == {False}
        assert {p.requires_grad for p in network.parameters()} == {True}


def test_a_report_asks_for_its_networks_once_and_makes_none_for_their_names() -> None:
    class Source:
        asked = 0

        def variants(self) -> dict[str, Variant]:
            self.asked += 1
            return {**variants(None), "unseen": Variant.later(unseen), "last": variants(None)["result"]}

    def unseen() -> Denoiser:
        raise AssertionError("nobody looked at it")

    source: Any = Source()
    callback = EfficiencyReport(rows=["result"])
    assert list(callback._variants(source, torch.device("cpu"))) == ["dense", "result", "unseen", "last"]
    assert source.asked == 1
    assert callback.row_names(source) == ["result", "last"]
