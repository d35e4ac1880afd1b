"""Diagonal of the diffusion Fisher.

diag F = (1 - (alpha/sigma)^2 sum_i w_i t_i^2)/sigma^2,  t_i = y_i - mean
(Prop. 1, eq. 11)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch import check, diagnosis, library
from ..._torch.types import Level
from ..common import lists, moments
from ..common.about_mean import about_mean
from ..common.derivatives import Stored
from ..common.moments import first_moment, weight_sum
from .reference import fisher_diagonal as reference

__all__ = ["fisher_diagonal", "reference"]


def _sums(e: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """sum e, sum e t, sum e t * t."""
    return weight_sum(e), first_moment(e, t), torch.einsum("bn,bnd->bd", e, t * t)


KIND = moments.register(
    moments.MomentKind(
        name="diagonal",
        sums=_sums,
        shapes=lambda x: (x.shape[:1], x.shape, x.shape),
        op="fisher_diagonal",
    )
)


def _differentiable(x, y, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None):
    stored = Stored(scale, offset, atoms, counts)
    z, (weight, first, second) = about_mean(KIND, x, y, alpha, sigma, log_prior, stored)
    weight = weight[:, None]
    cov = second / weight - (first / weight) ** 2
    return (1 - ((z.alpha / z.sigma) ** 2)[:, None] * cov) / (z.sigma * z.sigma)[:, None]


def _fake(x, y, alpha, sigma, log_prior, scale, offset):
    return x.new_empty(x.shape)


op = lists.define(
    "fisher_diagonal",
    "(Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, float scale, "
    "float offset, Tensor? atoms=None, Tensor? counts=None) -> Tensor",
    fallback=_differentiable,
    fake=_fake,
    cuda=library.in_triton(__name__),
    lists_on_cuda=True,
    differentiable=_differentiable,
)


def fisher_diagonal(
    x: Tensor,
    y: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
    atoms: Tensor | None = None,
    counts: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
    batched: bool = False,
) -> Tensor:
    """Computes the diagonal of the diffusion Fisher F = -Hessian of log q_t at each query.

    Prop. 1, eq. 11. Take care which of x and y is which: swapped, the call runs and returns
    something else.

    Args:
        x: Queries ``[B, *E]``, float32 or float64.
        y: Atoms ``[N, *E]``.
        alpha: Signal level of each query, a number or [B].
        sigma: Noise level of each query, a number or [B], positive.
        log_prior: Log weights [N], None for uniform ones.
        scale, offset, atoms, counts, kept: See `posterior`.
        batched: One call for G data sets, [G, B] in place of [B] and [G, N] of [N]; see
            `posterior`.

    Returns:
        ``[B, *E]`` in x's dtype; differentiable to any order in every tensor. First derivatives
        take one more pass over the atoms or, in y or log_prior and others together in reverse mode,
        two; second ones are slow.

    Raises:
        TypeError, ValueError: As `posterior` does.
    """
    args = check.points(x, y, alpha, sigma, log_prior, scale, offset, batched)
    args += lists.arguments(atoms, counts, kept, args[0], batched)
    out = diagnosis.call(op, args, x=x, y=y, **check.given_levels(alpha, sigma, batched))
    return out if x.dim() == 2 and not batched else out.reshape(x.shape)
