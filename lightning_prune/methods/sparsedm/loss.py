"""SparseDM's objective: noise prediction and distillation from the dense network at the same noisy sample."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import mse_loss


def sparsedm_loss(
    student: Tensor,
    target: Tensor,
    teacher: Tensor | None,
    noise_weight: float,
    distill_weight: float,
    weights: Tensor | None = None,
    matched: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """w_eps mse(target, s) + w_kd mse(T, s), means over all pixels and samples.

    Args:
        student: prediction of the masked network, any shape.
        target: what the process asks the network to predict, same shape.
        teacher: prediction of the dense network, same shape; None without distillation.
        noise_weight: w_eps.
        distill_weight: w_kd.
        weights: of the samples [B] in the distillation term; None is 1.
        matched: what is compared with `teacher` where that is not the prediction, as under guidance.

    Returns:
        The loss and its parts, without their weights w_eps and w_kd.
    """
    parts = {"denoise_loss": mse_loss(student, target)}
    total = noise_weight * parts["denoise_loss"]
    if teacher is not None:
        matched = student if matched is None else matched
        if weights is None:
            parts["distill_loss"] = mse_loss(matched, teacher)
        else:
            parts["distill_loss"] = ((matched - teacher).square().flatten(1).mean(1) * weights).mean()
        total = total + distill_weight * parts["distill_loss"]
    return total, {name: value.detach() for name, value in parts.items()}
