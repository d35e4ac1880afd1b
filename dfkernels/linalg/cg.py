"""Conjugate gradients for a batch of symmetric positive definite systems."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NotPositiveDefinite", "Solution", "conjugate_gradients", "power_of_two"]


class Solution(NamedTuple):
    """A solution x of A x = b, with the number of iterations and |b - A x|/|b| of each system."""

    x: Tensor
    iterations: Tensor
    residual: Tensor


class NotPositiveDefinite(ValueError):
    """A direction p of curvature <p, (A + shift I) p>/|p|^2 <= 0, for column `column` of the right
    hand side of matrix `batch`.
    """

    def __init__(self, batch: int, column: int, curvature: float) -> None:
        super().__init__(f"curvature {curvature:g} at matrix {batch}, column {column}")
        self.batch, self.column, self.curvature = batch, column, curvature


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], b: Tensor, shift: Tensor, *, tol: float, max_iter: int
) -> Solution:
    """Solves (A + shift I) x = b for symmetric A, known by its products only.

    Systems of one batch share every product. Whenever the residual that the recursion carries has
    converged, CG starts again from the true one, until that has converged, or no longer halves.

    Args:
        apply: v -> A v on [B, K, d].
        b: [B, K, d]; of any size, but A x has to be in the range of the dtype for |x| of order 1.
        shift: [B].
        tol: bound on |b - (A + shift I) x|/|b|.
        max_iter: of steps; at the end the solution may be worse than tol: see its residual.

    Raises:
        NotPositiveDefinite: A direction has no positive curvature.
    """
    scale = power_of_two(b.abs().amax(-1, keepdim=True))  # so that no square overflows
    b, shift = b / scale, shift[:, None, None]
    x = torch.zeros_like(b)
    size = b.norm(dim=-1).clamp_min(torch.finfo(b.dtype).tiny)
    steps = torch.zeros(b.shape[:2], dtype=torch.int64, device=b.device)
    r, p = b.clone(), b.clone()
    rr = r.square().sum(-1)
    todo = rr.sqrt() > tol * size
    residual = rr.sqrt() / size
    for _ in range(max_iter):
        if not bool(todo.any()):
            before = residual
            r = b - apply(x) - shift * x
            p, rr = r.clone(), r.square().sum(-1)
            residual = rr.sqrt() / size
            todo = (residual > tol) & (residual < before / 2)
            if not bool(todo.any()):
                return Solution(scale * x, steps, residual)
        ap = apply(p) + shift * p
        curvature = (p * ap).sum(-1)
        if bool((todo & ~(curvature > 0)).any()):
            batch, column = (todo & ~(curvature > 0)).nonzero()[0].tolist()
            quotient = curvature / p.square().sum(-1)
            raise NotPositiveDefinite(batch, column, quotient[batch, column].item())
        step = torch.where(todo, rr / curvature, 0.0)[..., None]
        x = x + step * p
        r = r - step * ap
        new = r.square().sum(-1)
        p = torch.where(todo[..., None], r + (new / rr)[..., None] * p, p)
        rr = torch.where(todo, new, rr)
        steps += todo
        todo = todo & (rr.sqrt() > tol * size)
    r = b - apply(x) - shift * x
    return Solution(scale * x, steps, r.norm(dim=-1) / size)


def power_of_two(t: Tensor) -> Tensor:
    """The largest power of two that is at most t >= 0; 1 for 0."""
    half = torch.frexp(t).mantissa * 2  # in [1, 2): t over it is exact
    return torch.where(t > 0, t / half, 1.0)
