"""What a pass over files finds, as a function that PyTorch can differentiate.

With M the mass, V the trace of the covariance C, and r = x - alpha mean, the derivatives of log M
are results of the same pass,

    d log M/dx = -r/sigma^2            d log M/d alpha = (<r, mean> - alpha V)/sigma^2
                                       d log M/d sigma = (|r|^2 + alpha^2 V)/sigma^3 - d/sigma

and d mean/dx = (alpha/sigma^2) C is a pass with vectors v. Made of results, both can be
differentiated again. All others take the second pass of `_derivatives`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..._torch import private
from ..._torch.errors import Unsupported
from ...partial import Partial
from ._derivatives import folded, gradients, moments_of, names, restored, tangents, unfolded
from ._pass import Pass

__all__ = ["partial_of"]


def partial_of(over: Pass, x: Tensor, alpha: Tensor, sigma: Tensor, v: Tensor | None) -> Partial:
    """The Partial of all rows, differentiable in all four tensors. Levels are [B]."""
    queries = (x, alpha, sigma, v)
    return restored(queries, _Moments.apply(over, *queries), over.diagonal)


class _Moments(torch.autograd.Function):
    """(pass, x, alpha, sigma, v) -> the moments of the Partial of all rows."""

    @staticmethod
    def forward(over: Pass, *queries: Any) -> tuple[Tensor, ...]:
        return tuple(moments_of(over.whole(*queries)))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.over, *queries = inputs
        ctx.mark_non_differentiable(output[0])  # log_weight
        ctx.save_for_backward(*queries, *output)
        ctx.save_for_forward(*queries, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        if private.in_legacy_vmap():
            raise Unsupported(
                "is_grads_batched: expected False with a ShardedCloud: loop over the cotangents, "
                "or call torch.func.vjp and torch.func.vmap"
            )
        saved = ctx.saved_tensors
        total = restored(saved[:4], saved[4:], ctx.over.diagonal)
        pairs = zip(names(total.v, ctx.over.diagonal)[1:], cotangents[1:], strict=True)
        given = {name: g for name, g in pairs if g is not None}
        needs = ctx.needs_input_grad[1:]
        of_results = {"log_mass"} if any(needs[1:3]) else {"log_mass", "mean"}
        rule = _of_results if given.keys() <= of_results else gradients
        return None, *rule(ctx.over, total, given, needs)

    @staticmethod
    def jvp(ctx, *given):
        saved = [_primal(t) for t in ctx.saved_tensors]
        total = restored(saved[:4], saved[4:], ctx.over.diagonal)
        return None, *tangents(ctx.over, total, given[1:])

    @staticmethod
    def vmap(info, in_dims, *args):
        over, *queries = args
        if all(dim is None for dim in in_dims[1:4]):
            x, alpha, sigma, v = queries
            rows = v.movedim(in_dims[4], 0)
            return _of_many_vectors(info.batch_size, over, x, alpha, sigma, rows)
        n = info.batch_size
        return unfolded(n, _Moments.apply(over, *folded(n, queries, in_dims[1:])))


def _primal(t: Any) -> Any:
    return None if t is None else forward_ad.unpack_dual(t, level=0).primal


def _of_results(
    over: Pass, total: Partial, given: dict[str, Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the log mass, and of the mean in x."""
    x, d = total.x, math.prod(total.x.shape[1:])
    alpha, sigma = total.alpha.double(), total.sigma.double()
    grads: list[Tensor | None] = [None] * 4
    if (g := given.get("log_mass")) is not None:
        mean, V = total.mean.reshape(len(x), d), total.variance
        r = x.reshape(len(x), d).double() - alpha[:, None] * mean
        grads[0] = -(g / sigma**2)[:, None] * r
        grads[1] = g * ((r * mean).sum(1) - alpha * V) / sigma**2
        grads[2] = g * (((r * r).sum(1) + alpha**2 * V) / sigma**3 - d / sigma)
    if needs[0] and (g := given.get("mean")) is not None:
        v = g.to(x.dtype)
        part = partial_of(replace(over, diagonal=False), x, total.alpha, total.sigma, v)
        assert part.covariance_product is not None
        along = (alpha / sigma**2)[:, None] * part.covariance_product.reshape(len(x), d)
        grads[0] = along if grads[0] is None else grads[0] + along
    return [
        g.to(x.dtype).reshape(shape) if need and g is not None else None
        for g, shape, need in zip(grads, (x.shape, *[(len(x),)] * 3), needs, strict=True)
    ]


def _of_many_vectors(n: int, over: Pass, x: Tensor, alpha: Tensor, sigma: Tensor, v: Tensor):
    """`_Moments` for v [n, B, *E] or [n, B, K, *E]: one call with n K vectors."""
    B, K = len(x), v.shape[2] if v.dim() > x.dim() + 1 else 1
    rows = v.reshape(n, B, K, *x.shape[1:]).movedim(0, 1).reshape(B, n * K, *x.shape[1:])
    found = list(_Moments.apply(over, x, alpha, sigma, rows))
    at = names(v, over.diagonal).index("covariance_product")
    found[at] = found[at].reshape(B, n, K, *x.shape[1:]).movedim(1, 0).reshape(v.shape)
    return tuple(found), tuple(0 if i == at else None for i in range(len(found)))
