"""transport_chain in plain PyTorch, flat. Materialises [B, N, d] at every step."""

from __future__ import annotations

import torch

from ..posterior.reference import weights


def coefficients(alpha, sigma, rates=None):
    """-> keep, pull, identity, spread, each [M], float64:

    x <- keep x + pull mean: DDIM, keep = sigma_s/sigma_t, pull = alpha_s - alpha_t keep
    A <- M A,  M = identity I + spread C: its exact derivative, keep I + (pull alpha_t/sigma_t^2) C,
    or with rates r [M, 2] the Euler step (1 + r_0) I + r_1 (alpha_t/sigma_t)^2 C.
    """
    alpha, sigma = alpha.double(), sigma.double()
    a, s = alpha[:-1], sigma[:-1]
    keep = sigma[1:] / s
    pull = alpha[1:] - a * keep
    if rates is None:
        return keep, pull, keep, pull * a / s**2
    return keep, pull, 1 + rates[:, 0].double(), rates[:, 1].double() * (a / s) ** 2


def advance(A, product, identity, spread, transposed):
    """identity A + spread C A, or A + A^T (M - I) as Algorithm 2 prints it; product = C A."""
    if transposed:
        return A + (identity - 1) * A.mT + spread * product.mT  # (C A)^T = A^T C
    return identity * A + spread * product


def normalised(A, log_norm):
    """|A|_F = sqrt(d), and the log of what that takes off."""
    size = torch.linalg.matrix_norm(A, keepdim=True) / A.shape[-1] ** 0.5
    return A / size, log_norm + size[:, 0, 0].log()


def transport_chain(x, y, alpha, sigma, log_prior=None, rates=None, transposed=False):
    """-> x [B, d] after M DDIM steps, A [B, d, d], log_norm [B]; differentiable by ordinary
    autograd."""
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
