"""Dense training from a teacher: what is learned from, what is reported, what is refused."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss

from lightning_prune.diffusion.process import Process
from lightning_prune.methods.dense import Dense
from lightning_prune.protocols import InputError
from tests.factories import fit, tiny_dit

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
