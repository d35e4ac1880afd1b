"""endpoint_matvec in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def endpoint_matvec(
    v: Tensor, x0: Tensor, mean: Tensor, alpha: Tensor, sigma: Tensor, form: str = "paper"
) -> Tensor:
    """(v - (alpha/sigma)^2 C v)/sigma^2 with C = x0 x0^T - mean mean^T (paper) or C = r r^T,
    r = x0 - mean (centred).

    Args:
        v: [B, K, d].
        x0, mean: [B, d].
        alpha, sigma: [B].
        form: "paper" or "centred".

    Returns:
        [B, K, d].
    """
    x0, mean = x0[:, None], mean[:, None]
    alpha, sigma = alpha[:, None, None], sigma[:, None, None]
    if form == "paper":
        cov = x0 * (v * x0).sum(-1, keepdim=True) - mean * (v * mean).sum(-1, keepdim=True)
    else:
        r = x0 - mean
        cov = r * (v * r).sum(-1, keepdim=True)
    return (v - (alpha / sigma) ** 2 * cov) / sigma**2
