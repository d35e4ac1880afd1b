"""DF-EA: the Fisher-vector product with one endpoint in place of the data set (eq. 20).

F v ~ v/sigma^2 - (alpha^2/sigma^4) C v
paper:   C = x0 x0^T - mean mean^T        centred: C = r r^T,  r = x0 - mean
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..._torch import check, diagnosis, library
from ..._torch.types import Level
from .reference import endpoint_matvec as reference

__all__ = ["endpoint_matvec", "reference"]


def _fake(v, x0, mean, alpha, sigma, form):
    return v.new_empty(v.shape)


op = library.define(
    "endpoint_matvec",
    "(Tensor v, Tensor x0, Tensor mean, Tensor alpha, Tensor sigma, str form) -> Tensor",
    fallback=reference,
    fake=_fake,
    cuda=library.in_triton(__name__),
    differentiable=reference,
)


def endpoint_matvec(
    v: Tensor,
    x0: Tensor,
    mean: Tensor,
    alpha: Level,
    sigma: Level,
    form: Literal["paper", "centred"] = "paper",
) -> Tensor:
    """Computes F v by the endpoint approximation DF-EA (eq. 20), which needs no data set.

    It is structurally weak: x0 x0^T - mean mean^T is indefinite and depends on the origin. How far
    the result points from the true one is tabulated at `methods.endpoint.fisher`.

    Args:
        v: Vectors ``[B, *E]``, or ``[B, K, *E]`` for K of them per sample; float32 or float64.
        x0: The path's endpoint, ``[B, *E]`` in v's dtype.
        mean: The denoiser's prediction of it, ``[B, *E]`` in v's dtype.
        alpha: Signal level of each sample, a number or [B].
        sigma: Noise level of each sample, a number or [B], positive.
        form: "paper" is eq. 20; "centred" is its translation-invariant variant, C = r r^T with
            r = x0 - mean.

    Returns:
        A tensor of v's shape, differentiable to any order in every tensor.

    Raises:
        TypeError, ValueError: As `posterior` does.
    """
    flat = check.query("x0", x0)
    flat_mean = check.like("mean", mean, "x0", x0)
    v3 = check.vectors("v", v, "x0", x0, flat.shape[1])
    check.choice("form", form, ("paper", "centred"))
    alpha, sigma = check.alpha(alpha, flat), check.sigma(sigma, flat)
    args = (v3, flat, flat_mean, alpha, sigma, form)
    return diagnosis.call(op, args, v=v, x0=x0, mean=mean).reshape(v.shape)
