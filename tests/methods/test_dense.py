"""Dense training from a teacher: what is learned from, what is reported, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.diffusion.process import Process
from lightning_prune.methods.dense import Dense
from lightning_prune.protocols import InputError
from tests.factories import DIT_CONFIG, UNET_CONFIG, fit, tiny_dit, tiny_unet

PROCESS = Process("cosine", "v")
BATCH = {"x": torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(3)), "cond": torch.arange(4)}


def test_the_loss_is_the_targets_and_the_teachers() -> None:
    student, teacher = tiny_dit(seed=1), tiny_dit(seed=0)
    module = Dense(student, PROCESS, teacher=teacher, distill_weight=3.0, seed=0)
    loss, values = module.loss(BATCH, torch.Generator().manual_seed(0))
    x_t, t, cond, target = module.diffuse(BATCH, torch.Generator().manual_seed(0))
    prediction = student(x_t, t, cond)
    torch.testing.assert_close(values["denoise_loss"], mse_loss(prediction, target))
    torch.testing.assert_close(values["distill_loss"], mse_loss(prediction, teacher.eval()(x_t, t, cond)))
    torch.testing.assert_close(loss, values["denoise_loss"] + 3 * values["distill_loss"])
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_is_reported_and_neither_trained_nor_saved(tmp_path: Path) -> None:
    teacher = tiny_dit(seed=0)
    module = Dense(tiny_dit(seed=1), PROCESS, teacher=teacher, seed=0)
    fit(module, tmp_path)
    assert list(module.variants()) == ["dense", "small dense"]
    assert module.variants()["dense"].denoiser is teacher
    before = tiny_dit(seed=0).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert module.state_dict().keys() == {f"denoiser.{name}" for name in before}


def test_a_teacher_of_other_classes_is_refused() -> None:
    teacher = tiny_dit()
    teacher.num_classes = 3
    with pytest.raises(InputError, match=r"model\.teacher: its num_classes 3 is not 10"):
        Dense(tiny_dit(), PROCESS, teacher=teacher)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.distill_weight: -1\.0 is negative"):
        Dense(tiny_dit(), PROCESS, teacher=tiny_dit(), distill_weight=-1.0)


def teacher_of(layers: int) -> DiT:
    torch.manual_seed(7)
    return DiT(config={**DIT_CONFIG, "num_layers": layers})


def test_a_small_network_begins_with_the_teachers_blocks() -> None:
    teacher = teacher_of(4)
    module = Dense(tiny_dit(seed=1), PROCESS, teacher=teacher, from_teacher=True, teacher_blocks=[0, 2])
    own, other = module.denoiser.network.state_dict(), teacher.network.state_dict()
    renamed = {name: name.replace("transformer_blocks.1.", "transformer_blocks.2.") for name in own}
    assert all(torch.equal(tensor, other[renamed[name]]) for name, tensor in own.items())
    assert module.inherited == 1.0


def test_the_whole_teacher_in_equal_shape_is_the_teacher() -> None:
    teacher = tiny_dit(seed=0).eval()
    module = Dense(tiny_dit(seed=1), PROCESS, teacher=teacher, from_teacher=True)
    x, t = BATCH["x"], torch.full((4,), 500)
    with torch.no_grad():
        assert torch.equal(module.denoiser.eval()(x, t, BATCH["cond"]), teacher(x, t, BATCH["cond"]))
    # Copied, not shared: training the one leaves the other.
    next(module.denoiser.parameters()).data.add_(1)
    assert not torch.equal(next(module.denoiser.parameters()), next(teacher.parameters()))


def test_a_narrower_unet_takes_over_what_has_its_shape() -> None:
    narrow = UNet2D(config={**UNET_CONFIG, "block_out_channels": [8, 24]})
    before = {name: tensor.clone() for name, tensor in narrow.network.state_dict().items()}
    teacher = tiny_unet()
    module = Dense(narrow, PROCESS, teacher=teacher, from_teacher=True)
    assert 0 < module.inherited < 1
    large = teacher.network.state_dict()
    for name, tensor in narrow.network.state_dict().items():
        fits = large[name].shape == tensor.shape
        assert torch.equal(tensor, large[name] if fits else before[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"from_teacher": True}, r"model\.from_teacher: there is no model\.teacher"),
        ({"teacher": tiny_dit(), "teacher_blocks": [0, 1]}, r"model\.teacher_blocks: .* only with"),
        ({"teacher": tiny_dit(), "from_teacher": True, "teacher_blocks": [0]}, r"\[0\]: give 2 numbers"),
        ({"teacher": tiny_dit(), "from_teacher": True, "teacher_blocks": [0, 2]}, r"one a block, below 2"),
    ],
)
def test_bad_inheritance_names_itself(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Dense(tiny_dit(), PROCESS, **arguments)
