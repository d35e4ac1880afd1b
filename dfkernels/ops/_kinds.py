"""What the ops sum over the atoms, on one tile, in the difference form. Plain differentiable PyTorch.

Per query and atom: e = exp(log_prior - |x - alpha y|^2/(2 sigma^2) - shift), t = y - centre. Every kind sums
e and e t, and
    posterior: e |t|^2, e^2      matvec: e <t, v_k> t      diagonal: e t * t      dense: e t t^T
"""

from __future__ import annotations

from typing import NamedTuple

import torch

X, Y, ALPHA, SIGMA, LOG_PRIOR, SHIFT, CENTRE, V = range(8)


def _weights(x, y, alpha, sigma, log_prior, shift, centre):
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
    sums: object
    sides: str  # of x, y, alpha, sigma, log_prior, shift, centre, (v): per query or per atom
    shapes: object  # z -> shapes of the sums


KINDS = {
    "posterior": Kind(
        _posterior, "qaqqaqq", lambda z: [z[X].shape[:1], z[X].shape, z[X].shape[:1], z[X].shape[:1]]
    ),
    "matvec": Kind(_matvec, "qaqqaqqq", lambda z: [z[X].shape[:1], z[X].shape, z[V].shape]),
    "diagonal": Kind(_diagonal, "qaqqaqq", lambda z: [z[X].shape[:1], z[X].shape, z[X].shape]),
    "dense": Kind(_dense, "qaqqaqq", lambda z: [z[X].shape[:1], z[X].shape, (*z[X].shape, z[X].shape[1])]),
}


def load(y, dtype, scale, offset):
    """The atoms' real values: scale * y + offset in the compute dtype."""
    y = y.to(dtype)
    return y if scale == 1.0 and offset == 0.0 else torch.add(y.new_tensor(offset), y, alpha=scale)
