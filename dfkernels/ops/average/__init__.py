"""Values that belong to the atoms, averaged with the posterior weights, in one pass.

w_i = softmax_i(log pi_i - |x - alpha y_i|^2/(2 sigma^2)),  average = sum_i w_i values_i
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import check, diagnosis, library
from ..._torch.types import Level
from ..common import lists, moments
from ..common.about_mean import about_mean, log_density
from ..common.derivatives import Stored
from ..common.moments import weight_sum
from .reference import average as reference

__all__ = ["Average", "average", "reference"]


class Average(NamedTuple):
    """What one pass over the atoms gives: log_prob [B] and average ``[B, *P]``."""

    log_prob: Tensor
    average: Tensor


def _sums(e: Tensor, t: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """sum e, sum e values."""
    values = torch.where((e != 0)[..., None], values, 0.0)  # whatever a weightless atom has
    return weight_sum(e), torch.einsum("bn,bnp->bp", e, values)


KIND = moments.register(
    moments.MomentKind(
        name="average",
        sums=_sums,
        shapes=lambda x, values: (x.shape[:1], (x.shape[0], values.shape[-1])),
        own=("values",),
    )
)


def _differentiable(x, y, values, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None):
    stored = Stored(scale, offset, atoms, counts)
    z, sums = about_mean(KIND, x, y, alpha, sigma, log_prior, stored, own=[values])
    weight, total = sums
    return log_density(z, weight), total / weight[:, None]


def _fake(x, y, values, alpha, sigma, log_prior, scale, offset):
    return x.new_empty(x.shape[0]), x.new_empty(x.shape[0], values.shape[-1])


op = lists.define(
    "average",
    "(Tensor x, Tensor y, Tensor values, Tensor alpha, Tensor sigma, Tensor? log_prior, "
    "float scale, float offset, Tensor? atoms=None, Tensor? counts=None) -> (Tensor, Tensor)",
    fallback=_differentiable,
    fake=_fake,
    cuda=library.in_triton(__name__),
    lists_on_cuda=True,
    differentiable=_differentiable,
    density=True,
)


def average(
    x: Tensor,
    y: Tensor,
    values: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
    atoms: Tensor | None = None,
    counts: Tensor | None = None,
) -> Average:
    """Averages values of the atoms with the posterior weights of each query, in one pass.

    Use it where something else than the atoms is to be averaged: labels (one-hot rows give the
    class posterior), velocities of pairs, targets of a regression, the rows of a matrix that a
    transport plan multiplies. With values = y it is the posterior mean.

    average = sum_i w_i values_i,  w_i = softmax_i(log pi_i - |x - alpha y_i|^2/(2 sigma^2))

    Args:
        x: Queries ``[B, *E]``, float32 or float64: the compute dtype, and that of every output.
        y: Atoms ``[N, *E]``, stored as x.dtype, float32, float16, bfloat16 or uint8; their values
            are scale * y + offset.
        values: What is averaged, ``[N, *P]`` in one of the dtypes of y, read as it is: a row for
            each atom. What a row holds does not matter where the atom has no weight.
        alpha: Signal level of each query, a number or [B]; 0 is legal (pure noise).
        sigma: Noise level of each query, a number or [B], positive.
        log_prior: Log weights [N], None for uniform ones; any constant may be added to them. -inf
            masks an atom, whatever it and its values hold.
        scale: Factor of the stored atoms.
        offset: What is added to them.
        atoms: Lists of atoms, int64 [M], as in `posterior`. log_prior stays normalised over all
            atoms.
        counts: How many of them each query has, int64 [B]; goes with atoms.

    Returns:
        Average(log_prob [B], average ``[B, *P]``), differentiable to any order in x, y, values,
        alpha, sigma and log_prior. Derivatives are tiled sums in PyTorch.

    Raises:
        TypeError: An argument has a type or dtype that it cannot have; the message names it.
        ValueError: So for a shape, a device or a value.
    """
    flat, atom_rows, *rest = check.points(x, y, alpha, sigma, log_prior, scale, offset)
    rows = check.values(values, flat, atom_rows)
    args = (flat, atom_rows, rows, *rest, *lists.arguments(atoms, counts, None, flat))
    log_prob, found = diagnosis.call(op, args, x=x, y=y, values=values)
    return Average(log_prob, found.reshape(x.shape[0], *values.shape[1:]))
