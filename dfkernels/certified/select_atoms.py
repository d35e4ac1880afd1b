"""The op ``select_atoms``: the atoms that can carry weight, from an index, reading little of y.

An atom is dropped only where its logit l_i = log pi_i - |x - alpha y_i|^2 / (2 sigma^2) certainly
lies more than `gap` below the k-th largest, rounding included: bounds on <x, y_i> follow from
integer codes and from the norms of what these leave over (docs/certified.md derives them). With
gap = log(N / eps) and k = 1, all dropped atoms together weigh less than eps.

    select_atoms(x, y, alpha, sigma, log_prior, scale, offset, *index, gap, k)
        -> (atoms int64 [total], counts int64 [B], dropped float64 [B])

`atoms` has the selected atoms of one query after another, `counts` how many each query has, -1 for
a query that should take all atoms. `dropped` bounds the weight of the dropped atoms, relative to
that of the selected ones.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .._torch import library
from .._torch.errors import Unsupported
from .pytorch import search_in_pytorch
from .reference import select_atoms as reference

__all__ = ["op", "reference"]


def _cuda(x: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    from .triton import launch

    return launch(x, *args) if len(x) else _fake(x, size=0)


def _fake(
    x: Tensor, *args, size: int | torch.SymInt | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    atoms = x.new_empty(library.unknown_size() if size is None else size, dtype=torch.int64)
    return (
        atoms,
        x.new_empty(len(x), dtype=torch.int64),
        x.new_empty(len(x), dtype=torch.float64),
    )


def _not_differentiable(*args) -> NoReturn:
    raise Unsupported(
        "tolerance: expected no vmap and no derivative around the search for atoms (select_atoms),"
        " got one: search outside of it, with detached tensors, or leave tolerance out to count all"
        " atoms"
    )


op = library.define(
    "select_atoms",
    "(Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, float scale, float offset,"
    " Tensor centre, Tensor basis, Tensor axis_scale, Tensor coarse_codes, Tensor fine_codes,"
    " Tensor atom_norm, Tensor code_scale, Tensor remainder_norm, Tensor axis_error, Tensor limits,"
    " float gap, int k) -> (Tensor, Tensor, Tensor)",
    fallback=search_in_pytorch,
    fake=_fake,
    cuda=_cuda,
    differentiable=_not_differentiable,
    batch=_not_differentiable,
)
