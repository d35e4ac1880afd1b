"""The diffusion Fisher as a matrix per query.

F = (I - (alpha/sigma)^2 sum_i w_i t_i t_i^T)/sigma^2,  t_i = y_i - mean        (Prop. 1, eq. 11)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch import check, library
from ..common import derivatives, lists
from ..posterior import anchored
from .reference import fisher_dense as reference

__all__ = ["fisher_dense", "reference"]


def _twin(x, y, alpha, sigma, log_prior, scale, offset):
    z = anchored(x, y, alpha, sigma, log_prior, scale, offset)
    s0, s1, a = derivatives.pair_sums("dense", z, scale, offset)
    moved = s1 / s0[:, None]
    cov = a / s0[:, None, None] - moved[:, :, None] * moved[:, None, :]
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return (eye - ((alpha / sigma) ** 2)[:, None, None] * cov) / (sigma * sigma)[:, None, None]


def _fake(x, y, alpha, sigma, log_prior, scale, offset):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


def _cuda(*args):
    from .triton import launch

    return launch(*args)


_SCHEMA = (
    "(Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, float scale, "
    "float offset, Tensor? atoms=None, Tensor? counts=None) -> Tensor"
)
op = lists.define(
    "fisher_dense",
    _SCHEMA,
    fallback=_twin,
    fake=_fake,
    cuda=_cuda,
    twin=_twin,
    batch=library.folded("fisher_dense", "qaqqa--"),
)


def fisher_dense(
    x: Tensor,
    y: Tensor,
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
    """The diffusion Fisher at each query (Prop. 1, eq. 11), [B, d, d] in x's dtype, d = prod(E).
    Symmetric up to rounding.

    Arguments, errors and derivatives as in `posterior`.
    """
    args = check.points(x, y, alpha, sigma, log_prior, scale, offset)
    args += lists.arguments(atoms, counts, kept, args[0])
    return check.call(op, args, x=x, y=y)
