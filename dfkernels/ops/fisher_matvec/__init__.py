"""Fisher-vector products, one or K vectors per query.

    F v = (v - (alpha/sigma)^2 C v)/sigma^2        C v = sum_i w_i t_i <t_i, v>,  t_i = y_i - mean
    (Prop. 1, eq. 11)

C v is an op of its own, covariance_matvec: (alpha/sigma^2) C is the Jacobian of the posterior mean,
and taking it out of F v would lose every digit where sigma is large.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._torch import autograd, check, diagnosis, library
from ..._torch.types import Level
from ..common import lists, moments
from ..common.about_mean import about_mean
from ..common.derivatives import Stored
from ..common.moments import first_moment, weight_sum
from .reference import fisher_matvec as reference

__all__ = ["fisher_matvec", "reference"]


def _sums(e: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """sum e, sum e t, sum e <t, v_k> t."""
    projection = torch.einsum("bnd,bkd->bkn", t, v)
    return weight_sum(e), first_moment(e, t), (e[:, None] * projection) @ t


KIND = moments.register(
    moments.MomentKind(
        name="matvec",
        sums=_sums,
        shapes=lambda x, v: (x.shape[:1], x.shape, v.shape),
        own=("v",),
        op="fisher_matvec",
    )
)


def _products(x, y, v, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None):
    """(the inputs, v, C v), in differentiable form."""
    stored = Stored(scale, offset, atoms, counts)
    z, (weight, first, second) = about_mean(KIND, x, y, alpha, sigma, log_prior, stored, [v])
    (v,) = autograd.with_tangents(weight, [v])
    weight, first = weight[:, None, None], first[:, None]
    delta = first / weight
    return z, v, second / weight - delta * (v * delta).sum(-1, keepdim=True)


def _covariance(*args):
    return _products(*args)[2]


def _fisher(*args):
    z, v, cov = _products(*args)
    ratio, variance = (z.alpha / z.sigma) ** 2, z.sigma * z.sigma
    return (v - ratio[:, None, None] * cov) / variance[:, None, None]


def _fake(x, y, v, alpha, sigma, log_prior, scale, offset):
    return v.new_empty(v.shape)


def _define(name: str, differentiable: Callable, fisher: bool):
    return lists.define(
        name,
        "(Tensor x, Tensor y, Tensor v, Tensor alpha, Tensor sigma, Tensor? log_prior, "
        "float scale, float offset, Tensor? atoms=None, Tensor? counts=None) -> Tensor",
        fallback=differentiable,
        fake=_fake,
        cuda=library.in_triton(__name__, fisher=fisher),
        lists_on_cuda=True,
        differentiable=differentiable,
    )


covariance_matvec = _define("covariance_matvec", _covariance, fisher=False)
op = _define("fisher_matvec", _fisher, fisher=True)


def fisher_matvec(
    x: Tensor,
    y: Tensor,
    v: Tensor,
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
    """Computes F v, the diffusion Fisher F = -Hessian of log q_t times vectors, without forming F.

    F = I/sigma^2 - (alpha^2/sigma^4) C (Prop. 1, eq. 11) is symmetric and at most I/sigma^2; it may
    be indefinite. Take care which of x and y is which: swapped, the call runs and returns something
    else.

    Args:
        x: Queries ``[B, *E]``, float32 or float64.
        y: Atoms ``[N, *E]``.
        v: Vectors in x's dtype, ``[B, *E]``, or ``[B, K, *E]`` for K of them per query in one pass.
        alpha: Signal level of each query, a number or [B].
        sigma: Noise level of each query, a number or [B], positive.
        log_prior: Log weights [N], None for uniform ones.
        scale, offset, atoms, counts, kept: See `posterior`.
        batched: One call for G data sets, [G, B] in place of [B] and [G, N] of [N]; see
            `posterior`.

    Returns:
        A tensor of v's shape, differentiable to any order in every tensor. In either mode first
        derivatives cost one more pass over the atoms or, in y or log_prior and others together in
        reverse mode, two. Second derivatives are slow.

    Raises:
        TypeError, ValueError: As `posterior` does.
    """
    flat, stored, *others = check.points(x, y, alpha, sigma, log_prior, scale, offset, batched)
    args = (flat, stored, check.vectors("v", v, "x", x, flat.shape[1], batched), *others)
    args += lists.arguments(atoms, counts, kept, flat, batched)
    given = {"x": x, "y": y, "v": v, **check.given_levels(alpha, sigma, batched)}
    return diagnosis.call(op, args, **given).reshape(v.shape)
