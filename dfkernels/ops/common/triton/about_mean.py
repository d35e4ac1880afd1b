# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""`moments_about_mean` (../pair_kernels.py) on CUDA: the moments that the ops accumulate, merged in
double and taken about the mean as it is rounded."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .. import lists, pair_kernels
from . import launch
from .problem import Lists

OPS = {
    "posterior": "posterior",
    "matvec": "fisher_matvec",
    "diagonal": "fisher_diagonal",
    "dense": "fisher_dense",
}


def moments_about_mean(
    x, y, v, alpha, sigma, log_pi, scale, offset, kind, atoms, counts
) -> tuple[Tensor, ...]:
    """For tensors on one GPU: shift, reference, weight, first, second and weight_square."""
    B, d = x.shape
    if B == 0:
        second = {"posterior": (0,), "diagonal": (0, d), "dense": (0, d, d)}
        shape = v.shape if kind == "matvec" else second[kind]
        empty = x.new_zeros(0)
        return (
            empty.double(),
            x.new_zeros(0, d),
            empty,
            x.new_zeros(0, d),
            x.new_zeros(shape),
            empty,
        )
    args = (x, y, v, alpha, sigma, log_pi, scale, offset, kind, atoms, counts)
    if y.dim() > 2 or (log_pi is not None and log_pi.dim() > 1):
        clouds = lists.each_cloud(pair_kernels.moments_about_mean, args)
        return lists.joined([moments_about_mean(*cloud) for cloud in clouds])
    module = importlib.import_module(f"dfkernels.ops.{OPS[kind]}.triton")
    if kind == "dense" and not module.takes_products(x, atoms):
        given = (x, y, module.units(x), alpha, sigma, log_pi, scale, offset, "matvec")
        *outs, second, square = moments_about_mean(*given, atoms, counts)
        return *outs, (second + second.mT) / 2, square
    given = (x, y, v if kind == "matvec" else None, alpha, sigma, log_pi, scale, offset)
    more = {"normalised": True, "lists": Lists.of(atoms, counts)}
    outs = launch.in_query_groups(module.about_mean, *given, **more)
    shift, reference, first, second, weight_square = outs
    square = weight_square if kind == "posterior" else weight_square[:0]
    weight, *rest = (t.to(x.dtype) for t in (torch.ones_like(shift), first, second, square))
    return shift, reference, weight, *rest
