"""The atoms that can carry weight, from an index, without reading most of the data.

An atom is left out only where its logit l_i = log pi_i - |x - alpha y_i|^2 / (2 sigma^2) is certain
to lie more than `gap` below the k-th largest: bounds on <x, y_i> follow from integer codes and the
norms of what they leave over, rounding included (docs/certified.md derives them). With gap = log(N
/ eps), k = 1, all that is left out weighs less than eps together.
"""

from __future__ import annotations

import math

import torch

from .._torch import library
from .._torch.errors import Unsupported
from .cascade import BLOCK, Screen, cascade
from .fields import FIELDS, check_layout, check_values
from .reference import kept_atoms as reference

__all__ = ["op", "reference"]


def in_pytorch(x, y, alpha, sigma, log_prior, scale, offset, *rest):
    *index, gap, k = rest
    index = dict(zip(FIELDS, index, strict=True))
    check_layout(index, *y.shape, x.device)
    check_values(index)
    index = {name: t.contiguous() for name, t in index.items()}
    if not 0 <= gap < math.inf:
        raise RuntimeError(f"gap: expected a finite number >= 0, got {gap}")
    if not 1 <= k <= len(y):
        raise RuntimeError(f"k: expected 1 <= k <= {len(y)}, got {k}")
    atoms, counts, dropped = [], [], []
    for b in range(0, len(x), BLOCK):
        some = slice(b, b + BLOCK)
        s = Screen(x[some], y, alpha[some], sigma[some], log_prior, scale, offset, index, gap, k)
        cascade(s, **index)
        everything = s.takes_all()
        s.alive &= ~everything
        atoms += [s.atoms[alive] for alive in s.alive]
        counts.append(s.alive.sum(1).masked_fill(everything[:, 0], -1))
        dropped.append(s.share().masked_fill(everything[:, 0], 0))
    if not counts:
        return _fake(x, size=0)
    return torch.cat(atoms), torch.cat(counts), torch.cat(dropped)


def _cuda(x, *args):
    from .triton import launch

    return launch(x, *args) if len(x) else _fake(x, size=0)


def _fake(x, *args, size=None):
    size = library.unknown_size() if size is None else size
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


op = library.define(
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
