"""The atoms that can carry weight, from an index, without reading most of the data.

An atom is left out only where its logit l_i = log pi_i - |x - alpha y_i|^2 / (2 sigma^2) is certain to lie more
than `gap` below the k-th largest: bounds on <x, y_i> follow from integer codes and the norms of what they leave
over, rounding included (docs/certified.md derives them). With gap = log(N / eps), k = 1, all that is left out
weighs less than eps together.
"""

from __future__ import annotations

import torch

from ... import _op
from ..._errors import Unsupported
from .cascade import BLOCK, Screen, cascade
from .reference import kept_atoms as reference

__all__ = ["op", "reference"]


def in_pytorch(x, y, alpha, sigma, log_prior, scale, offset, centre, *rest):
    *index, gap, k = rest
    atoms, counts, dropped = [], [], []
    for b in range(0, len(x), BLOCK):
        some = slice(b, b + BLOCK)
        s = Screen(x[some], y, alpha[some], sigma[some], log_prior, scale, offset, centre, index[-1], gap, k)
        cascade(s, *index)
        atoms += [s.atoms[alive] for alive in s.alive]
        counts.append(s.alive.sum(1))
        dropped.append(s.share())
    if not counts:
        return _fake(x, size=0)
    return torch.cat(atoms), torch.cat(counts), torch.cat(dropped)


def _cuda(x, *args):
    from .triton import launch

    return launch(x, *args) if len(x) else _fake(x, size=0)


def _fake(x, *args, size=None):
    size = _op.unknown_size() if size is None else size
    empty = x.new_empty
    return (
        empty(size, dtype=torch.int64),
        empty(len(x), dtype=torch.int64),
        empty(len(x), dtype=torch.float64),
    )


def _not_differentiable(*args):
    raise Unsupported(
        "tolerance: expected no vmap and no derivative around the search for atoms (kept_atoms), got one: search "
        "outside of it, with detached tensors, or leave tolerance out to count all atoms"
    )


op = _op.define(
    "kept_atoms",
    "(Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, float scale, float offset,"
    " Tensor centre, Tensor basis, Tensor step, Tensor first, Tensor tail, Tensor size, Tensor scales,"
    " Tensor rest, Tensor shift, Tensor facts, float gap, int k) -> (Tensor, Tensor, Tensor)",
    fallback=in_pytorch,
    fake=_fake,
    cuda=_cuda,
    twin=_not_differentiable,
    fast=_not_differentiable,
    batch=_not_differentiable,
)
