"""matched_trace in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def matched_trace(
    m: Tensor,
    eps: Tensor,
    x: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    form: str = "residual",
) -> Tensor:
    """(d/sigma^2)(1 - m) (residual), or d/sigma^2 - (alpha^2/sigma^4)(d m - |mean|^2) (paper),
    where alpha mean = x - sigma eps.

    Args:
        m: [B].
        eps: [B, d].
        x: [B, d]; not used in the residual form.
        alpha, sigma: [B].
        form: "residual" or "paper".

    Returns:
        [B].
    """
    d = eps.shape[1]
    if form == "residual" or x is None:
        return d * (1 - m) / sigma**2
    scaled_mean = x - sigma[:, None] * eps  # alpha * mean, so that alpha = 0 needs no division
    return (d - (d * m * alpha**2 - (scaled_mean * scaled_mean).sum(1)) / sigma**2) / sigma**2
