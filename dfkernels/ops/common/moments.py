"""What the ops sum over the atoms, on one tile, in the difference form. Plain differentiable
PyTorch.

Per query and atom: e = exp(log_prior - |x - alpha y|^2/(2 sigma^2) - shift), t = y - centre. Every
kind sums e and e t, and
    posterior: e |t|^2, e^2      matvec: e <t, v_k> t      diagonal: e t * t      dense: e t t^T
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

X, Y, ALPHA, SIGMA, LOG_PRIOR, SHIFT, CENTRE, V = range(8)


def logits(x, y, alpha, sigma, log_prior):
    """log_prior - |x - alpha y|^2/(2 sigma^2), [B, N], for atoms y [N, d] or, one set per query,
    [B, N, d].

    -inf for a masked atom, even one that holds NaN.
    """
    u = (x[:, None] - alpha[:, None, None] * y) / sigma[:, None, None]
    return torch.where(log_prior == -math.inf, -math.inf, log_prior - 0.5 * (u * u).sum(-1))


def without_the_weightless(weights, y, log_prior, stand_in):
    """Atoms and log priors per query, [B, N, d] and [B, N], in which an atom without weight cannot
    be seen.

    Zero times NaN or infinity is NaN, in a sum and in every derivative of it. So where `weights`
    [B, N] is 0 an atom of finite coordinates, the query's row of stand_in [B, d], takes the atom's
    place before anything is computed, with a log prior of -inf. torch.where passes exactly 0 back
    to what it leaves out.
    """
    weighs = weights != 0  # NaN counts: only an atom that is not masked can cause it
    return (
        torch.where(weighs[..., None], y, stand_in.detach()[:, None]),
        torch.where(weighs, log_prior, -math.inf),
    )


def _weights(x, y, alpha, sigma, log_prior, shift, centre):
    """e [B, N] and t [B, N, d]."""
    with torch.no_grad():
        weights = torch.exp(logits(x, y, alpha, sigma, log_prior) - shift[:, None])
    y, log_prior = without_the_weightless(weights, y, log_prior, centre)
    u = (x[:, None] - alpha[:, None, None] * y) / sigma[:, None, None]
    e = torch.exp(log_prior - 0.5 * (u * u).sum(-1) - shift[:, None])
    return e, y - centre[:, None]


def _posterior(*z):
    e, t = _weights(*z)
    return e.sum(1), torch.einsum("bn,bnd->bd", e, t), (e * (t * t).sum(-1)).sum(1), (e * e).sum(1)


def _matvec(*z):
    e, t = _weights(*z[:V])
    p = torch.einsum("bnd,bkd->bkn", t, z[V])
    return e.sum(1), torch.einsum("bn,bnd->bd", e, t), (e[:, None] * p) @ t


def _diagonal(*z):
    e, t = _weights(*z)
    return e.sum(1), torch.einsum("bn,bnd->bd", e, t), torch.einsum("bn,bnd->bd", e, t * t)


def _dense(*z):
    e, t = _weights(*z)
    return e.sum(1), torch.einsum("bn,bnd->bd", e, t), (e[..., None] * t).mT @ t


class Kind(NamedTuple):
    """One family of sums: how to compute them on a tile, and what they look like."""

    sums: Callable  # *z -> the sums, a tuple
    sides: str  # of x, y, alpha, sigma, log_prior, shift, centre, (v): q per query or a per atom
    shape_of: tuple[Callable, ...]  # one function of z per sum: the sum's shape

    def shapes(self, z):
        return [shape(z) for shape in self.shape_of]


def _number(z):
    return z[X].shape[:1]


def _vector(z):
    return z[X].shape


def _vectors(z):
    return z[V].shape


def _matrix(z):
    return (*z[X].shape, z[X].shape[1])


KINDS = {
    "posterior": Kind(_posterior, "qaqqaqq", (_number, _vector, _number, _number)),
    "matvec": Kind(_matvec, "qaqqaqqq", (_number, _vector, _vectors)),
    "diagonal": Kind(_diagonal, "qaqqaqq", (_number, _vector, _vector)),
    "dense": Kind(_dense, "qaqqaqq", (_number, _vector, _matrix)),
}


def load(y, dtype, scale, offset):
    """The atoms' real values: scale * y + offset in the compute dtype."""
    y = y.to(dtype)
    return y if scale == 1.0 and offset == 0.0 else torch.add(y.new_tensor(offset), y, alpha=scale)
