"""transport_chain in plain PyTorch, for flat tensors. Materialises [B, N, d] at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..posterior.reference import weights


def coefficients(
    alpha: Tensor, sigma: Tensor, rates: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x <- keep x + pull mean is DDIM, with keep = sigma_s/sigma_t, pull = alpha_s - alpha_t keep.

    A <- M A with M = identity I + spread C is its exact derivative, keep I + (pull
    alpha_t/sigma_t^2) C, or with rates r [M, 2] the Euler step (1 + r_0) I + r_1
    (alpha_t/sigma_t)^2 C.

    Returns:
        keep, pull, identity, spread, each [M] in float64.
    """
    alpha, sigma = alpha.double(), sigma.double()
    a, s = alpha[:-1], sigma[:-1]
    keep = sigma[1:] / s
    pull = alpha[1:] - a * keep
    if rates is None:
        return keep, pull, keep, pull * a / s**2
    return keep, pull, 1 + rates[:, 0].double(), rates[:, 1].double() * (a / s) ** 2


def advance(
    A: Tensor,
    product: Tensor,
    identity: float | Tensor,
    spread: float | Tensor,
    transposed: bool,
) -> Tensor:
    """identity A + spread C A, or A + A^T (M - I) as Algorithm 2 prints it; product = C A."""
    if transposed:
        return A + (identity - 1) * A.mT + spread * product.mT  # (C A)^T = A^T C
    return identity * A + spread * product


def normalised(A: Tensor, log_norm: Tensor) -> tuple[Tensor, Tensor]:
    """A scaled to |A|_F = sqrt(d), and log_norm with the log of what that takes off."""
    size = torch.linalg.matrix_norm(A, keepdim=True) / A.shape[-1] ** 0.5
    return A / size, log_norm + size[:, 0, 0].log()


def transport_chain(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_prior: Tensor | None = None,
    rates: Tensor | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """x <- keep x + pull mean, A <- (identity I + spread C) A, M times, by ordinary autograd
    differentiable.

    Args:
        x: [B, d].
        y: [N, d].
        alpha, sigma: [M + 1].
        log_prior: [N], or None.
        rates, transposed: See the public op.

    Returns:
        x [B, d] after M steps, A [B, d, d], log_norm [B].
    """
    A = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)
    log_norm = x.new_zeros(x.shape[0])
    steps = torch.stack(
        [alpha[:-1].double(), sigma[:-1].double(), *coefficients(alpha, sigma, rates)], 1
    )
    for a, s, keep, pull, identity, spread in steps.tolist():
        _, atoms, *_, w = weights(x, y, a, s, log_prior)
        mean = (w[..., None] * atoms).sum(1)
        t = atoms - mean[:, None]
        product = (w[..., None] * t).mT @ (t @ A)
        A, log_norm = normalised(advance(A, product, identity, spread, transposed), log_norm)
        x = keep * x + pull * mean
    return x, A, log_norm
