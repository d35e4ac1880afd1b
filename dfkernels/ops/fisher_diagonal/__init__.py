"""Diagonal of the diffusion Fisher.

diag F = (1 - (alpha/sigma)^2 sum_i w_i t_i^2)/sigma^2,  t_i = y_i - mean        (Prop. 1, eq. 11)
"""

from __future__ import annotations

from torch import Tensor

from ..._torch import check, library
from ..common import derivatives, lists
from ..posterior import anchored
from .reference import fisher_diagonal as reference

__all__ = ["fisher_diagonal", "reference"]


def _twin(x, y, alpha, sigma, log_prior, scale, offset):
    z = anchored(x, y, alpha, sigma, log_prior, scale, offset)
    s0, s1, a = derivatives.pair_sums("diagonal", z, scale, offset)
    s0 = s0[:, None]
    cov = a / s0 - (s1 / s0) ** 2
    return (1 - ((alpha / sigma) ** 2)[:, None] * cov) / (sigma * sigma)[:, None]


def _fake(x, y, alpha, sigma, log_prior, scale, offset):
    return x.new_empty(x.shape)


def _cuda(*args):
    from .triton import launch

    return launch(*args)


_SCHEMA = (
    "(Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, float scale, "
    "float offset, Tensor? atoms=None, Tensor? counts=None) -> Tensor"
)
op = lists.define(
    "fisher_diagonal",
    _SCHEMA,
    fallback=_twin,
    fake=_fake,
    cuda=_cuda,
    twin=_twin,
    batch=library.folded("fisher_diagonal", "qaqqa--"),
)


def fisher_diagonal(
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
    """Diagonal of the diffusion Fisher at each query (Prop. 1, eq. 11), [B, *E] in x's dtype.

    Arguments, errors and derivatives as in `posterior`.
    """
    args = check.points(x, y, alpha, sigma, log_prior, scale, offset)
    args += lists.arguments(atoms, counts, kept, args[0])
    out = check.call(op, args, x=x, y=y)
    return out if x.dim() == 2 else out.reshape(x.shape)
