"""Third central moment of the posterior, coordinate by coordinate.

m3 = sum_i w_i (y_i - mean)^3
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfkernels._torch import check, diagnosis
from dfkernels._torch.types import Level
from dfkernels.ops.common import lists, moments
from dfkernels.ops.common.about_mean import about_mean
from dfkernels.ops.common.derivatives import Stored
from dfkernels.ops.common.moments import first_moment, weight_sum

from .reference import third_moment as reference

__all__ = ["reference", "third_moment"]


def _sums(e: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """sum e, sum e t, sum e t^2, sum e t^3."""
    second, third = (torch.einsum("bn,bnd->bd", e, t**power) for power in (2, 3))
    return weight_sum(e), first_moment(e, t), second, third


KIND = moments.register(
    moments.MomentKind(
        name="third_moment",
        sums=_sums,
        shapes=lambda x: (x.shape[:1], x.shape, x.shape, x.shape),
    )
)


def _differentiable(x, y, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None):
    stored = Stored(scale, offset, atoms, counts)
    _, (weight, *sums) = about_mean(KIND, x, y, alpha, sigma, log_prior, stored)
    first, second, third = (s / weight[:, None] for s in sums)
    return third - 3 * first * second + 2 * first**3


def _fake(x, y, alpha, sigma, log_prior, scale, offset):
    return x.new_empty(x.shape)


op = lists.define(
    "third_moment",
    "(Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, float scale, "
    "float offset, Tensor? atoms=None, Tensor? counts=None) -> Tensor",
    fallback=_differentiable,
    fake=_fake,
    cuda=_differentiable,  # library.in_triton(__name__), where there is a triton.py
    differentiable=_differentiable,
)


def third_moment(
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
) -> Tensor:
    """Computes the third central moment of the posterior at each query, ``[B, *E]`` in x's dtype.

    Arguments, derivatives and errors as in `posterior`.
    """
    args = check.points(x, y, alpha, sigma, log_prior, scale, offset)
    args += lists.arguments(atoms, counts, None, args[0])
    out = diagnosis.call(op, args, x=x, y=y)
    return out if x.dim() == 2 else out.reshape(x.shape)
