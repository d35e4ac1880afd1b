"""Diagonal of the diffusion Fisher of a Gaussian mixture under noise.

diag F = sum_i w_i (1/tau_i^2 - (s_i - score)^2)
(Prop. 3; notation as in mixture_posterior)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..._torch import diagnosis, library
from ..._torch.types import Level
from ..common import mixture, moments
from ..common.moments import first_moment, weight_sum
from ..fisher_diagonal import op as fisher_diagonal
from .reference import mixture_diagonal as reference

__all__ = ["mixture_diagonal", "reference"]


def _sums(c: mixture.Terms) -> tuple[Tensor, ...]:
    """sum e, sum e s, sum e s * s, sum e/tau^2; s about the reference."""
    second = torch.einsum("bn,bnd->bd", c.e, c.score * c.score)
    return weight_sum(c.e), first_moment(c.e, c.score), second, first_moment(c.e, c.precision)


KIND = moments.register(
    mixture.MixtureKind(
        name="mixture_diagonal",
        sums=_sums,
        shapes=lambda x, variance: (
            (x.shape[:1], x.shape, x.shape, (x.shape[0], variance.shape[-1]))
        ),
        own=("variance",),
    )
)


def _diagonal(*args, differentiated: bool):
    _, _, sums = mixture.sums(KIND, args, differentiated=differentiated)
    weight, first, second, precision = sums
    weight = weight[:, None]
    return (precision - second) / weight + (first / weight) ** 2


op = library.define(
    "mixture_diagonal",
    "(Tensor x, Tensor y, Tensor variance, Tensor alpha, Tensor sigma, Tensor? log_prior, "
    "float scale, float offset) -> Tensor",
    fallback=partial(_diagonal, differentiated=False),
    fake=lambda x, *_: x.new_empty(x.shape),
    differentiable=partial(_diagonal, differentiated=True),
    shared=mixture.SHARED,
)


def mixture_diagonal(
    x: Tensor,
    y: Tensor,
    variance: Tensor | float,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """Computes the diagonal of the diffusion Fisher F = -Hessian of log q_t of a Gaussian mixture.

    Prop. 3. Take care which of x and y is which: swapped, the call runs and returns something else.

    Args:
        x: Queries ``[B, *E]``, float32 or float64.
        y: Means of the components ``[N, *E]``.
        variance: Variances of the components, a number, [1], [N], ``[1, *E]`` or ``[N, *E]``; see
            `mixture_posterior`.
        alpha: Signal level of each query, a number or [B].
        sigma: Noise level of each query, a number or [B], positive.
        log_prior: Log weights [N], None for uniform ones.
        scale, offset: See `mixture_posterior`.

    Returns:
        ``[B, *E]`` in x's dtype, differentiable to any order in every tensor. Derivatives are tiled
        sums in PyTorch.

    Raises:
        TypeError, ValueError: As `mixture_posterior` does.
    """
    args = mixture.arguments(x, y, variance, alpha, sigma, log_prior, scale, offset)
    given = mixture.given(args, x=x, y=y, variance=variance)
    if atoms := mixture.widened(args):
        return diagnosis.call(fisher_diagonal, atoms, **given).reshape(x.shape)
    return diagnosis.call(op, args, **given).reshape(x.shape)
