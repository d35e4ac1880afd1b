"""endpoint_matvec in plain PyTorch, flat: v [B, K, d], x0 and mean [B, d], alpha and sigma [B]."""

from __future__ import annotations


def endpoint_matvec(v, x0, mean, alpha, sigma, form="paper"):
    """(v - (alpha/sigma)^2 C v)/sigma^2 with C = x0 x0^T - mean mean^T (paper) or (x0 - mean)(x0 -
    mean)^T (centred).
    """
    x0, mean = x0[:, None], mean[:, None]
    alpha, sigma = alpha[:, None, None], sigma[:, None, None]
    if form == "paper":
        cov = x0 * (v * x0).sum(-1, keepdim=True) - mean * (v * mean).sum(-1, keepdim=True)
    else:
        r = x0 - mean
        cov = r * (v * r).sum(-1, keepdim=True)
    return (v - (alpha / sigma) ** 2 * cov) / sigma**2
