"""Fisher-vector products of a Gaussian mixture under noise, one or K vectors per query.

F v = (sum_i w_i/tau_i^2) v - sum_i w_i (s_i - score) <s_i - score, v>
(Prop. 3; notation as in mixture_posterior)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..._torch import check, diagnosis, library
from ..._torch.types import Level
from ..common import mixture, moments
from ..common.moments import first_moment, weight_sum
from ..fisher_matvec import op as fisher_matvec
from .reference import mixture_matvec as reference

__all__ = ["mixture_matvec", "reference"]


def _sums(c: mixture.Terms, v: Tensor) -> tuple[Tensor, ...]:
    """sum e, sum e s, sum e <s, v_k> s, sum e/tau^2; s about the reference."""
    projection = torch.einsum("bnd,bkd->bkn", c.score, v)
    second = (c.e[:, None] * projection) @ c.score
    return weight_sum(c.e), first_moment(c.e, c.score), second, first_moment(c.e, c.precision)


KIND = moments.register(
    mixture.MixtureKind(
        name="mixture_matvec",
        sums=_sums,
        shapes=lambda x, variance, v: (
            (x.shape[:1], x.shape, v.shape, (x.shape[0], variance.shape[-1]))
        ),
        own=("variance", "v"),
    )
)


def _products(x, v, y, variance, alpha, sigma, log_prior, scale, offset, *, differentiated):
    args = (x, y, variance, alpha, sigma, log_prior, scale, offset)
    _, _, sums = mixture.sums(KIND, args, [v], differentiated=differentiated)
    weight, first, second, precision = sums
    delta = (first / weight[:, None])[:, None]
    second = second / weight[:, None, None] - delta * (v * delta).sum(-1, keepdim=True)
    return (precision / weight[:, None])[:, None] * v - second


op = library.define(
    "mixture_matvec",
    "(Tensor x, Tensor v, Tensor y, Tensor variance, Tensor alpha, Tensor sigma, "
    "Tensor? log_prior, float scale, float offset) -> Tensor",
    fallback=partial(_products, differentiated=False),
    fake=lambda x, v, *_: v.new_empty(v.shape),
    differentiable=partial(_products, differentiated=True),
    shared=mixture.SHARED,
)


def mixture_matvec(
    x: Tensor,
    v: Tensor,
    y: Tensor,
    variance: Tensor | float,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """Computes F v, the diffusion Fisher F = -Hessian of log q_t of a Gaussian mixture times
    vectors, without forming F.

    F = diag(sum_i w_i/tau_i^2) - sum_i w_i (s_i - score)(s_i - score)^T (Prop. 3) is symmetric.
    Take care which of x, v and y is which: swapped, the call runs and returns something else.

    Args:
        x: Queries ``[B, *E]``, float32 or float64.
        v: Vectors in x's dtype, ``[B, *E]``, or ``[B, K, *E]`` for K of them per query in one call.
        y: Means of the components ``[N, *E]``.
        variance: Variances of the components, a number, [1], [N], ``[1, *E]`` or ``[N, *E]``; see
            `mixture_posterior`.
        alpha: Signal level of each query, a number or [B].
        sigma: Noise level of each query, a number or [B], positive.
        log_prior: Log weights [N], None for uniform ones.
        scale, offset: See `mixture_posterior`.

    Returns:
        A tensor of v's shape, differentiable to any order in every tensor. Derivatives are tiled
        sums in PyTorch.

    Raises:
        TypeError, ValueError: As `mixture_posterior` does.
    """
    args = mixture.arguments(x, y, variance, alpha, sigma, log_prior, scale, offset)
    vectors = check.vectors("v", v, "x", x, args[0].shape[1])
    given = mixture.given(args, x=x, y=y, v=v, variance=variance)
    if atoms := mixture.widened(args):
        found = diagnosis.call(fisher_matvec, (*atoms[:2], vectors, *atoms[2:]), **given)
    else:
        found = diagnosis.call(op, (args[0], vectors, *args[1:]), **given)
    return found.reshape(v.shape)
