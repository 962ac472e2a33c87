"""Masked layers: gradient, decay, switching, selection."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.protocols import InputError, PrunableUnit, Sparsity
from lightning_prune.pruning.masks import MaskSet, effective_state, masked_layers, select_units
from lightning_prune.pruning.nm import nm_mask
from tests.traffic import Traffic

TWO_FOUR = Sparsity(2, 4)


def units_of(network: nn.Module) -> list[PrunableUnit]:
    return [
        PrunableUnit(
            name, "conv" if isinstance(layer, nn.Conv2d) else "linear", (f"{name}.weight",), layer.weight.shape[1]
        )
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 16, 12))


def masked(sparsity: Sparsity | None = TWO_FOUR) -> tuple[Any, MaskSet]:
    net = network()
    return net, MaskSet(net, units_of(net), sparsity)


def test_specified_gradient() -> None:
    """W = (1, -2, 3, -4) at 2:4, upstream g = 0.1, lambda = 2e-4 (specification, check 2)."""
    net: Any = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2, 3, -4]]))
    masks = MaskSet(net, units_of(net), TWO_FOUR)
    net(torch.full((1, 4), 0.1)).sum().backward()
    masks.add_decay(2e-4)
    expected = torch.tensor([[0.1002, 0.0996, 0.1, 0.1]])
    torch.testing.assert_close(net[0].weight.grad, expected, rtol=0, atol=1e-7)


def test_straight_through_gradient_equals_the_hand_written_one() -> None:
    """dL/dW = dL/d(W m), dense, plus lambda (1 - m) W."""
    net, masks = masked()
    x, strength = torch.randn(5, 4, 4, 4), 0.03
    net(x).square().sum().backward()
    masks.add_decay(strength)
    plain = network()
    weights: dict[str, Tensor] = {}
    for index in (0, 3):
        weight = plain[index].weight
        with torch.no_grad():
            weights[str(index)] = weight.clone()
            weight.mul_(nm_mask(weight, TWO_FOUR))
    plain(x).square().sum().backward()
    for index in (0, 3):
        shadow = weights[str(index)]
        expected = plain[index].weight.grad + strength * (~nm_mask(shadow, TWO_FOUR)) * shadow
        torch.testing.assert_close(net[index].weight.grad, expected)
        torch.testing.assert_close(net[index].bias.grad, plain[index].bias.grad)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_decay_through_the_loss_gives_the_same_gradient(accumulated: int) -> None:
    """As a term of the loss of every batch accumulated, or once added to the gradient."""
    strength, batches = 0.03, [torch.randn(5, 4, 4, 4) for _ in range(accumulated)]
    (one, added), (other, collected) = masked(), masked()
    other.load_state_dict(one.state_dict())
    collected.refresh()
    collected.collect_decay()
    for x in batches:
        (one(x).square().sum() / accumulated).backward()
        loss = other(x).square().sum() + strength * collected.collected_decay()
        (loss / accumulated).backward()
    added.add_decay(strength)
    for ours, theirs in zip(other.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert collected.collected_decay() == 0.0


@pytest.mark.parametrize("pattern", ["1:4", (1, 4), Sparsity(1, 4), {".*": "1:4"}, {"0": (1, 4), "3": Sparsity(1, 4)}])
def test_patterns_are_written_in_any_way(pattern: Any) -> None:
    _, masks = masked()
    masks.set_sparsity(pattern)
    assert {layer.sparsity for layer in masks.layers.values()} == {Sparsity(1, 4)}


@pytest.mark.parametrize("pattern", ["2-4", (2, 4, 8), (5, 4), 2, (2.0, 4), {"0": "x"}])
def test_what_is_no_pattern_is_refused_and_changes_nothing(pattern: Any) -> None:
    _, masks = masked()
    with pytest.raises(InputError, match="sparsity"):
        masks.set_sparsity(pattern)
    assert {layer.sparsity for layer in masks.layers.values()} == {TWO_FOUR}


def test_pruned_weights_receive_gradient_and_may_return() -> None:
    net: Any = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.1, 1.0, 0.1]]))
    masks = MaskSet(net, units_of(net), TWO_FOUR)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    (-3 * net(torch.tensor([[0.0, 1.0, 0.0, 0.0]]))).sum().backward()
    optimizer.step()
    masks.refresh()
    mask = net[0].mask
    assert mask is not None
    assert mask[0].tolist() == [1, 1, 0, 0]


def test_dense_two_four_dense_is_bit_identical() -> None:
    net, masks = masked(None)
    reference, x = network(), torch.randn(3, 4, 4, 4)
    before = net(x)
    assert torch.equal(before, reference(x))
    masks.set_sparsity(TWO_FOUR)
    assert not torch.equal(net(x), before)
    masks.set_sparsity(None)
    assert torch.equal(net(x), before)


def test_output_is_that_of_the_baked_network() -> None:
    net, _ = masked()
    plain, x = network(), torch.randn(2, 4, 4, 4)
    plain.load_state_dict(effective_state(net))
    assert torch.equal(net(x), plain(x))


def test_parameter_names_and_dense_weights_survive_masking() -> None:
    net, _ = masked()
    reference = network().state_dict()
    assert net.state_dict().keys() == reference.keys()
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in reference.items())


def test_the_mask_follows_the_weight_only_after_a_refresh() -> None:
    net, masks = masked()
    with torch.no_grad():
        net[3].weight.copy_(net[3].weight.roll(1, dims=1))
    assert not torch.equal(net[3].mask.bool(), nm_mask(net[3].weight, TWO_FOUR))
    assert masks.violations() == 0
    assert masks.violations(compare=True) > 0
    masks.refresh()
    assert torch.equal(net[3].mask.bool(), nm_mask(net[3].weight, TWO_FOUR))
    assert masks.violations(compare=True) == 0


def test_violations_see_a_broken_mask() -> None:
    net, masks = masked()
    net[3].mask[0, :4] = 1
    assert masks.violations() == 1


def test_a_layer_that_does_not_divide_stays_dense_in_that_stage() -> None:
    net, masks = masked(Sparsity(15, 16))
    assert set(masked_layers(net)) == {"3"}
    masks.set_sparsity(TWO_FOUR)
    assert set(masked_layers(net)) == {"0", "3"}


def test_patterns_by_layer() -> None:
    net, masks = masked(None)
    masks.set_sparsity({"3": Sparsity(1, 4)})
    assert {name: str(layer.sparsity) for name, layer in masked_layers(net).items()} == {"3": "1:4"}
    assert masks.density_by_layer() == {"0": 1.0, "3": 0.25}


def test_a_copy_has_masks_of_its_own() -> None:
    net, _ = masked()
    copy = deepcopy(net)
    copy[3].set_sparsity(None)
    assert net[3].sparsity == TWO_FOUR


def test_selection() -> None:
    units = units_of(network())
    assert [u.name for u in select_units(units, None, [], 4)] == ["0", "3"]
    assert [u.name for u in select_units(units, None, ["0"], 4)] == ["3"]
    assert [u.name for u in select_units(units, None, [], 8)] == ["3"]
    assert [u.name for u in select_units(units, ["3"], [], 4)] == ["3"]


@pytest.mark.parametrize(
    ("include", "exclude", "m", "message"),
    [
        (["nothing.*"], [], 4, "'nothing.*' matches no layer"),
        (None, ["absent"], 4, "'absent' matches no layer"),
        (["["], [], 4, "no regular expression"),
        (["0"], [], 8, "0: input dimension 4 is no multiple of 8"),
        (None, [], 7, "no layer is left"),
    ],
)
def test_bad_selections_name_the_pattern(include: list[str] | None, exclude: list[str], m: int, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("*", r"\*").replace("[", r"\[")):
        select_units(units_of(network()), include, exclude, m)


def test_masks_are_frozen_once_every_layer_under_one_is() -> None:
    """Where a ramp changes some layers' patterns, those of the others are frozen already."""
    _, masks = masked()
    first, *rest = masks.layers.values()
    assert rest
    found: list[bool] = []
    for change in (
        masks.freeze,
        lambda: first.set_sparsity(Sparsity(1, 4)),
        masks.freeze,
        lambda: first.set_sparsity(None),
        lambda: masks.set_sparsity(None),
    ):
        change()
        found.append(masks.frozen)
    assert found == [True, False, True, True, False]


def test_scores_scales_and_frozen_masks_go_to_the_device_once() -> None:
    """The meta device stands for any other: a second refresh copies nothing there."""
    for kind in ("scores", "scales", "frozen"):
        net, masks = masked()
        if kind == "scores":
            masks.set_scores({name: torch.rand_like(layer.weight) for name, layer in masks.layers.items()})
        elif kind == "scales":
            masks.set_scales({name: torch.rand_like(layer.weight[:1]) for name, layer in masks.layers.items()})
        else:
            masks.freeze()
        net.to("meta")
        masks.refresh()
        with Traffic() as traffic:
            masks.refresh()
        assert traffic.copies == 0, kind
        assert {mask.device.type for mask in masks.masks().values()} == {"meta"}


def test_checks_of_all_layers_read_one_number() -> None:
    _, masks = masked()
    with Traffic() as traffic:
        assert masks.violations(compare=True) == 0
    assert traffic.reads == 1
    with Traffic() as traffic:
        assert set(masks.flips().values()) == {0.0}
        assert set(masks.density_by_layer().values()) == {0.5}
    assert traffic.reads == 0, "lists are read at once"


def test_flips_are_counted_after_the_network_moved() -> None:
    net, masks = masked()
    net.double()
    before = masks.flips()
    net.to("meta")
    with pytest.raises(RuntimeError, match="no data"):  # the comparison is on one device, which has no values to read
        masks.flips()
    assert set(before.values()) == {0.0}
