"""Derivatives of a pass over files by a second pass.

No graph of a pass is kept, as it would hold the atoms. With P_k = M_k/M the share of block k in the
mass M and delta_k = mean_k - mean, the differential of each result is that of a sum over the
blocks, in which everything of the whole is held fixed:

    log M    sum P_k
    mean     sum P_k delta_k
    V        sum P_k (V_k + |delta_k|^2 - V)
    Q        sum P_k^2 Q_k - 2 Q P_k
    C v      sum P_k (C_k v + delta_k <delta_k, v> - C v)           (and so diag C)

So every block is read again, and differentiated by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..._torch import check, private
from ..._torch.errors import Unsupported
from ..._torch.shapes import column
from ...partial import QUERIES, Partial
from ._pass import Pass

__all__ = ["folded", "gradients", "moments_of", "names", "restored", "tangents", "unfolded"]

_OTHERS = (*QUERIES, "value_mean", "certificate")
_MOMENTS = tuple(f.name for f in fields(Partial) if f.name not in _OTHERS)


def names(v: Tensor | None, diagonal: bool) -> list[str]:
    """The moments that a pass finds, log_weight first."""
    absent = {"covariance_product" * (v is None), "covariance_diagonal" * (not diagonal)}
    return [name for name in _MOMENTS if name not in absent]


def moments_of(part: Partial) -> list[Tensor]:
    """The moments that it has, in the order of `names`."""
    found = [getattr(part, name) for name in _MOMENTS]
    return [t for t in found if t is not None]


def restored(queries: Sequence[Any], moments: Sequence[Tensor], diagonal: bool) -> Partial:
    """The Partial of x, alpha, sigma and v, and the moments in the order of `names`."""
    x, alpha, sigma, v = queries
    named: dict[str, Any] = dict(zip(names(v, diagonal), moments, strict=True))
    return Partial(x, alpha, sigma, v, **named)


def gradients(
    over: Pass, total: Partial, cotangents: dict[str, Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients in x, alpha, sigma and v, where needed.

    Args:
        total: What the pass has found.
        cotangents: Of some of its moments, by name.
        needs: Of x, alpha, sigma and v.
    """
    asked = list(cotangents)
    again = replace(over, diagonal="covariance_diagonal" in asked)  # what is asked, and no more

    def compute(*tensors: Any) -> tuple[Tensor, ...]:
        queries, found, given = _split(tensors, len(asked))
        fixed = restored(queries, found, over.diagonal)

        def add(made: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaves = [
                    t.detach().requires_grad_() if need else t
                    for t, need in zip(queries, needs, strict=True)
                ]
                x, alpha, sigma, v = leaves
                v = v if "covariance_product" in asked else None
                terms = _terms(again.block(y, x, alpha, sigma, v), fixed)
                loss = sum((g * terms[name]).sum() for name, g in zip(asked, given, strict=True))
                wanted = [t for t, need in zip(leaves, needs, strict=True) if need]
                found = _gradient(loss, wanted)
            return tuple(a + b for a, b in zip(made, found, strict=True))

        wanted = [t for t, need in zip(queries, needs, strict=True) if need]
        nothing = tuple(torch.zeros_like(t, dtype=torch.float64) for t in wanted)
        total = nothing
        said = {f"gradient in {name}": g for name, g in zip(asked, given, strict=True)}
        for made in again.by_file("gradient", said, nothing, add):
            total = tuple(a + b for a, b in zip(total, made, strict=True))
        return tuple(g.to(t.dtype) for g, t in zip(total, wanted, strict=True))

    found = iter(_once(compute, total, cotangents.values()))
    return [next(found) if need else None for need in needs]


def _gradient(loss: Any, wanted: list[Tensor]) -> Sequence[Tensor]:
    if not isinstance(loss, Tensor) or not loss.requires_grad:  # V in v, say
        return [torch.zeros_like(t) for t in wanted]
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def tangents(over: Pass, total: Partial, given: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The tangents of the moments but log_weight, for those of x, alpha, sigma and v."""
    moved = [i for i, t in enumerate(given) if t is not None]

    def compute(*tensors: Any) -> tuple[Tensor, ...]:
        queries, found, along = _split(tensors, len(moved))
        fixed = restored(queries, found, over.diagonal)
        asked = names(fixed.v, over.diagonal)[1:]

        def add(made: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad(), private.forward_derivatives(True):
                duals = list(queries)
                for i, t in zip(moved, along, strict=True):
                    duals[i] = forward_ad.make_dual(queries[i].contiguous(), t, level=0)
                terms = _terms(over.block(y, *duals), fixed)
                found = [forward_ad.unpack_dual(terms[name], level=0).tangent for name in asked]
            return tuple(a if b is None else a + b for a, b in zip(made, found, strict=True))

        nothing = tuple(torch.zeros_like(getattr(fixed, name)) for name in asked)
        total = nothing
        said = {f"tangent of {QUERIES[i]}": t for i, t in zip(moved, along, strict=True)}
        for made in over.by_file("derivative", said, nothing, add):
            total = tuple(a + b for a, b in zip(total, made, strict=True))
        return total

    return _once(compute, total, [t for t in given if t is not None])


def _terms(part: Partial, total: Partial) -> dict[str, Tensor]:
    """The terms of a block in the sums above."""
    share = torch.exp(part.log_mass - total.log_mass)
    delta = part.mean - total.mean
    B, d = len(share), math.prod(part.x.shape[1:])
    flat = delta.reshape(B, d)
    square = (flat * flat).sum(1)
    terms = {
        "log_mass": share,
        "mean": column(share, delta) * delta,
        "variance": share * (part.variance + square - total.variance),
        "weight_square": share**2 * part.weight_square - 2 * total.weight_square * share,
    }
    product, of_all = part.covariance_product, total.covariance_product
    if part.v is not None and product is not None and of_all is not None:
        rows = check.vectors("v", part.v, "x", part.x, d).double()
        along = (flat[:, None] * rows).sum(-1, keepdim=True)
        product = product + (flat[:, None] * along).reshape(part.v.shape)
        terms["covariance_product"] = column(share, product) * (product - of_all)
    spread, of_all = part.covariance_diagonal, total.covariance_diagonal
    if spread is not None and of_all is not None:
        terms["covariance_diagonal"] = column(share, spread) * (spread + delta * delta - of_all)
    return terms


def _split(tensors: Sequence[Any], last: int) -> tuple[Sequence, Sequence, Sequence]:
    """Queries, moments, and the `last` ones."""
    end = len(tensors) - last
    return tensors[:4], tensors[4:end], tensors[end:]


def _once(compute: Callable, total: Partial, given: Any) -> tuple[Tensor, ...]:
    """compute(queries, moments, given), whose derivatives are refused."""
    queries = (total.x, total.alpha, total.sigma, total.v)
    return _Once.apply(compute, *queries, *moments_of(total), *given)


class _Once(torch.autograd.Function):
    """(function, tensors) -> function(tensors), not to be differentiated again."""

    @staticmethod
    def forward(compute: Callable, *tensors: Any) -> tuple[Tensor, ...]:
        return compute(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise _unsupported()

    @staticmethod
    def jvp(ctx, *tangents):
        raise _unsupported()

    @staticmethod
    def vmap(info, in_dims, *args):
        compute, *tensors = args
        n = info.batch_size
        return unfolded(n, _Once.apply(compute, *folded(n, tensors, in_dims[1:])))


def folded(n: int, tensors: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    """Arguments of n calls, for one call with n times the queries."""

    def of(t: Any, dim: int | None) -> Any:
        if t is None or (dim is None and t.dim() == 0):
            return t
        return (t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)

    return [of(t, dim) for t, dim in zip(tensors, dims, strict=True)]


def unfolded(n: int, outs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The results of that call, for each of the n, and where they have them."""
    each = tuple(t.unflatten(0, (n, len(t) // n)) if t.dim() else t for t in outs)
    return each, tuple(0 if t.dim() else None for t in outs)


def _unsupported() -> Unsupported:
    return Unsupported(
        "x, alpha, sigma, v: expected first derivatives of a ShardedCloud, got a second one, which "
        "only log_prob in x, alpha and sigma and the mean in x have: call the operators for a "
        "PointCloud of some of the atoms, cloud.rows(numbers)"
    )
