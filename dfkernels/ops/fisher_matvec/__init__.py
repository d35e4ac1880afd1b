"""Fisher-vector products, one or K vectors per query.

    F v = (v - (alpha/sigma)^2 C v)/sigma^2        C v = sum_i w_i t_i <t_i, v>,  t_i = y_i - mean
    (Prop. 1, eq. 11)

C v is an inner op of its own, covariance_matvec: (alpha/sigma^2) C is the Jacobian of the posterior
mean, and taking it out of F v would lose every digit where sigma is large.
"""

from __future__ import annotations

from torch import Tensor

from ..._torch import check, library
from ..common import derivatives, lists
from ..posterior import anchored
from .reference import fisher_matvec as reference

__all__ = ["fisher_matvec", "reference"]


def _covariance_twin(x, y, v, alpha, sigma, log_prior, scale, offset):
    z = anchored(x, y, alpha, sigma, log_prior, scale, offset)
    s0, s1, a = derivatives.pair_sums("matvec", [*z, v], scale, offset)
    s0, s1 = s0[:, None, None], s1[:, None]
    moved = s1 / s0
    return a / s0 - moved * (v * moved).sum(-1, keepdim=True)


def _twin(x, y, v, alpha, sigma, log_prior, scale, offset):
    cov = covariance_matvec(x, y, v, alpha, sigma, log_prior, scale, offset)
    return (v - ((alpha / sigma) ** 2)[:, None, None] * cov) / (sigma * sigma)[:, None, None]


def _fake(x, y, v, alpha, sigma, log_prior, scale, offset):
    return v.new_empty(v.shape)


def _symmetric(own):
    def fast(needs, args, outputs, cotangents):
        """Only v: both operators are symmetric."""
        if any(need for i, need in enumerate(needs) if i != 2):
            return None
        x, y, _, *rest = args
        return None, None, own()(x, y, cotangents[0], *rest), *[None] * len(rest)

    return fast


def _cuda(fisher):
    def implementation(*args):
        from .triton import launch

        return launch(*args, fisher=fisher)

    return implementation


_SCHEMA = (
    "(Tensor x, Tensor y, Tensor v, Tensor alpha, Tensor sigma, Tensor? log_prior, float scale, "
    "float offset, Tensor? atoms=None, Tensor? counts=None) -> Tensor"
)
covariance_matvec = lists.define(
    "covariance_matvec",
    _SCHEMA,
    fallback=_covariance_twin,
    fake=_fake,
    cuda=_cuda(fisher=False),
    twin=_covariance_twin,
    fast=_symmetric(lambda: covariance_matvec),
    batch=library.folded("covariance_matvec", "qaqqqa--"),
)
op = lists.define(
    "fisher_matvec",
    _SCHEMA,
    fallback=_twin,
    fake=_fake,
    cuda=_cuda(fisher=True),
    twin=_twin,
    fast=_symmetric(lambda: op),
    batch=library.folded("fisher_matvec", "qaqqqa--"),
)


def fisher_matvec(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    alpha,
    sigma,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
    atoms: Tensor | None = None,
    counts: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """F v for the diffusion Fisher F = -Hessian of log q_t at each query (Prop. 1, eq. 11), without
    forming F.

    Args:
        x, y, alpha, sigma, log_prior, scale, offset, atoms, counts, kept: as in `posterior`.
        v: [B, *E], or [B, K, *E] for K vectors per query in one pass; dtype of x.

    Returns a tensor of v's shape. F is symmetric and at most I/sigma^2; it may be indefinite.
    Differentiable to any order in every tensor.

    Raises ValueError or TypeError naming the argument; see `posterior` for values.
    """
    flat, stored, *rest = check.points(x, y, alpha, sigma, log_prior, scale, offset)
    args = (flat, stored, check.vectors("v", v, "x", x, flat.shape[1]), *rest)
    args += lists.arguments(atoms, counts, kept, flat)
    return check.call(op, args, x=x, y=y, v=v).reshape(v.shape)
