"""DF-EA: the Fisher-vector product with one endpoint in place of the data set (eq. 20).

F v ~ v/sigma^2 - (alpha^2/sigma^4) C v
paper:   C = x0 x0^T - mean mean^T        centred: C = r r^T,  r = x0 - mean
"""

from __future__ import annotations

from torch import Tensor

from ..._torch import check, library
from .reference import endpoint_matvec as reference

__all__ = ["endpoint_matvec", "reference"]


def _fake(v, x0, mean, alpha, sigma, form):
    return v.new_empty(v.shape)


def _cuda(*args):
    from .triton import launch

    return launch(*args)


op = library.define(
    "endpoint_matvec",
    "(Tensor v, Tensor x0, Tensor mean, Tensor alpha, Tensor sigma, str form) -> Tensor",
    fallback=reference,
    fake=_fake,
    cuda=_cuda,
    twin=reference,
    batch=library.folded("endpoint_matvec", "qqqqq-"),
)


def endpoint_matvec(
    v: Tensor, x0: Tensor, mean: Tensor, alpha, sigma, form: str = "paper"
) -> Tensor:
    """F v by the endpoint approximation DF-EA (eq. 20). Needs no data set.

    Args:
        v: [B, *E], or [B, K, *E] for K vectors per sample; float32 or float64.
        x0, mean: [B, *E], v's dtype: the path's endpoint and the denoiser's prediction.
        alpha, sigma: float, 0-d or [B]; sigma > 0.
        form: "paper" is eq. 20; "centred" is its translation-invariant variant, C = r r^T with r =
        x0 - mean.

    Structurally weak: x0 x0^T - mean mean^T is indefinite and depends on the origin. Cosine to the
    true adjoint at the end of a path on a smooth toy density: .14 (d = 8), .00 (d = 64); the
    centred form .82, .18; no correction at all .87, .93.

    Returns a tensor of v's shape; differentiable to any order in every tensor.

    Raises ValueError or TypeError naming the argument; see `posterior` for values.
    """
    flat = check.query("x0", x0)
    flat_mean = check.like("mean", mean, "x0", x0)
    v3 = check.vectors("v", v, "x0", x0, flat.shape[1])
    check.choice("form", form, ("paper", "centred"))
    alpha, sigma = check.alpha(alpha, flat), check.sigma(sigma, flat)
    return check.call(op, (v3, flat, flat_mean, alpha, sigma, form), v=v, x0=x0, mean=mean).reshape(
        v.shape
    )
