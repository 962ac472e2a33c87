"""Drift against the dense network: what equal, shifted and unrelated images give."""

import math

import pytest
import torch

from lightning_prune.metrics.drift import drift, joined


def images(seed: int, count: int = 6) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equal_images_do_not_drift() -> None:
    found = drift(images(0), images(0)).summary()
    assert found["mse"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["ssim"]["value"] == pytest.approx(1)
    assert found["psnr"]["value"] == pytest.approx(10 * math.log10(255**2 * 12))


def test_a_shift_has_the_closed_form() -> None:
    dense = images(0) * 0.5
    found = drift(dense + 20 / 127.5, dense)
    torch.testing.assert_close(found.psnr, torch.full((6,), 10 * math.log10(255**2 / 400)), rtol=0, atol=0.05)
    torch.testing.assert_close(found.mse, torch.full((6,), (20 / 127.5) ** 2))


def test_each_image_has_its_own_value_and_batches_join() -> None:
    dense, ours = images(0), torch.cat([images(0)[:3], images(1)[3:]])
    whole = drift(ours, dense)
    assert (whole.psnr[:3] > 58).all()
    assert (whole.psnr[3:] < 12).all()
    assert (whole.ssim[3:] < 0.2).all()
    parts = joined([drift(ours[:2], dense[:2]), drift(ours[2:], dense[2:])])
    for name in ("psnr", "ssim", "mse"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_the_interval_shrinks_with_the_count() -> None:
    wide, narrow = (drift(images(1, n), images(0, n)).summary()["mse"] for n in (10, 160))
    assert narrow["high"] - narrow["low"] < 0.5 * (wide["high"] - wide["low"])
    assert wide["low"] < narrow["value"] < wide["high"]
