"""What is replayed is what would have been computed, and what is put away is not held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.pruning.replay import Replay
from lightning_prune.pruning.spill import Spill
from tests.factories import tiny_dit, tiny_unet

FACTORIES: dict[str, Callable[[], Denoiser]] = {"transformer": tiny_dit, "unet": tiny_unet}


class Case:
    """A network, and what it computes for two batches."""

    def __init__(self, name: str) -> None:
        self.denoiser = FACTORIES[name]()
        for parameter in self.denoiser.parameters():  # adaptive norms and last layers begin at zero
            parameter.data += 0.05 * torch.randn_like(parameter)
        self.denoiser.eval().requires_grad_(False)
        self.network: nn.Module = self.denoiser.network
        self.groups = list(self.denoiser.groups())
        self.names = [group.name for group in self.groups]
        self.x = torch.randn(2, 3, *self.denoiser.sample_shape)

    def run(self, batch: int) -> Tensor:
        output: Tensor = self.denoiser(self.x[batch], torch.tensor([10, 400, 900]), torch.tensor([0, 3, 9]))
        return output

    def change(self, name: str) -> None:
        """Change what the output layer of a group computes."""
        (output,) = (group.output for group in self.groups if group.name == name)
        self.network.get_submodule(output).get_parameter("weight").data *= 1.1

    @contextmanager
    def called(self) -> Iterator[list[str]]:
        """Names of the output layers that compute inside, in their order."""
        found: list[str] = []
        by_output = {group.output: group.name for group in self.groups}
        handles = [
            self.network.get_submodule(output).register_forward_hook(lambda *_, name=name: found.append(name))
            for output, name in by_output.items()
        ]
        yield found
        for handle in handles:
            handle.remove()


@pytest.fixture(params=list(FACTORIES))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("spill", [False, True])
def test_a_network_changed_in_running_order_computes_the_same(case: Case, spill: bool, tmp_path: Path) -> None:
    with case.called() as order:
        case.run(0)
    order = list(order)
    replay = Replay(case.network, case.names, tmp_path if spill else None)
    for position, name in enumerate(order):
        case.change(name)
        for batch in (0, 1):
            plain = case.run(batch)
            with case.called() as computed, replay.until(name, batch):
                again = case.run(batch)
            assert torch.equal(again, plain)
            # What came before the change the last time was not yet seen as it is now.
            assert computed == order[max(0, position - 1) :], "only what may have changed is computed"
    assert not list(tmp_path.iterdir())


def test_groups_in_any_order_and_masks_that_go_again(case: Case) -> None:
    """As a probe does it: one group is changed and restored, then the next, in whatever order."""
    replay = Replay(case.network, case.names)
    for name in reversed(case.names):
        (output,) = (group.output for group in case.groups if group.name == name)
        weight = case.network.get_submodule(output).get_parameter("weight")
        before = weight.data
        weight.data = before * 0.5
        plain = case.run(0)
        with replay.until(name, 0):
            assert torch.equal(case.run(0), plain)
        weight.data = before


def test_the_network_is_itself_again_afterwards(case: Case) -> None:
    replay = Replay(case.network, case.names)
    with pytest.raises(IndexError), replay.until(case.names[-1], 0):
        case.run(2)
    assert not any("forward" in vars(module) for module in case.network.modules())
    plain = case.run(0)
    case.change(case.names[0])
    assert not torch.equal(case.run(0), plain), "nothing is replayed any more"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spill", [False, True])
def test_tensors_come_back_as_they_were_put(spill: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    kept = Spill(tmp_path / "run" if spill else None)
    tensors = [torch.randn(3, 4), torch.randn(5, 2, 2)[:, 1], torch.randn(1), torch.randn(2, 3).T]
    tensors = [tensor.to(dtype) for tensor in tensors]
    places = [kept.put(tensor) for tensor in tensors]
    expected = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    for place, tensor in reversed(list(zip(places, expected, strict=True))):
        assert torch.equal(kept.get(place), tensor)
        assert kept.get(place).stride() == tensor.stride()
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    assert spill != any(isinstance(place, Tensor) for place in places), "of tensors in a file none is held"
