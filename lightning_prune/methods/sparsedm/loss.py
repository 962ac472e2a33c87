"""SparseDM's objective: noise prediction and distillation from the dense network at the same noisy sample."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import mse_loss


def sparsedm_loss(
    student: Tensor, target: Tensor, teacher: Tensor | None, noise_weight: float, distill_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """w_eps mse(target, s) + w_kd mse(T, s), means over all pixels and samples, unweighted in t.

    Args:
        student: prediction of the masked network, any shape.
        target: what the process asks the network to predict, same shape.
        teacher: prediction of the dense network, same shape; None without distillation.
        noise_weight: w_eps.
        distill_weight: w_kd.

    Returns:
        The loss and its unweighted parts.
    """
    parts = {"denoise_loss": mse_loss(student, target)}
    total = noise_weight * parts["denoise_loss"]
    if teacher is not None:
        parts["distill_loss"] = mse_loss(student, teacher)
        total = total + distill_weight * parts["distill_loss"]
    return total, {name: value.detach() for name, value in parts.items()}
