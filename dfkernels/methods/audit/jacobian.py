"""The network's Jacobian J = d eps/dx, by its products with vectors.

J^T v is a derivative in reverse mode. J v is a central difference: two calls, which work through
attention and whatever else has no derivative in forward mode. In float32 it is exact to some 2e-4
of |J v|, far below what an audit asks for, where J changes little within the step; in half
precision it is not, and the verdict says so. Of eigenvalues the differences choose the direction
alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._torch.objects import plain
from ...linalg.lanczos import orthonormal
from ..convention.queries import Rng
from ..endpoint import fisher
from ..traces import Hutchinson
from . import estimates
from .levels import Level
from .parts import Estimate, JacobianAudit
from .task import Task
from .thresholds import IMPOSSIBLE, derivative_error

__all__ = ["measured"]

_QUERIES, _PROBES = 8, 4  # of the asymmetry and the eigenvalues
_KRYLOV = 12  # vectors, in whose span the largest eigenvalue is sought


def measured(
    task: Task, level: Level, x: Tensor, exact: Tensor | None, rng: Rng
) -> tuple[Tensor, JacobianAudit]:
    """sigma tr J/d of each query x [Q, *E], float64 [Q] on the CPU, and the audit of the Jacobian.

    Args:
        exact: sigma^2 tr F/d of the training data at the queries [Q].
    """
    trace = _trace(task, level, x, rng)
    few = x[:: task.repeats][:_QUERIES]
    forward, backward = (
        fisher(form, few, level.t, task.denoiser) for form in ("finite-difference", "vjp")
    )
    start = rng.normal(len(few), _PROBES, x[0].numel()).to(x)
    ahead, back = (level.sigma**2 * operator.apply(start) for operator in (forward, backward))
    top = _top_vector(lambda v: (forward.apply(v) + backward.apply(v)) / 2, start[:, :1])
    # v^T J v by the exact derivative alone: of J that changes within a step, differences are none
    values = level.sigma**2 * (top * backward.apply(top)).double().sum((1, 2)).cpu()
    allowed = max(IMPOSSIBLE, derivative_error(task.denoiser.rounding(x)))
    return trace, JacobianAudit(
        _asymmetry(ahead, back),
        values.max().item(),
        (values > 1 + allowed).double().mean().item(),
        estimates.mean(trace, task.groups),
        None if exact is None else estimates.mean(exact, task.groups),
        None if exact is None else estimates.mean(trace - exact, task.groups),
    )


def _trace(task: Task, level: Level, x: Tensor, rng: Rng) -> Tensor:
    source = Hutchinson(task.generator(rng))  # one probe: the queries are many

    def trace(x: Tensor) -> Tensor:
        return source.begin(task.denoiser, x)(x, level.time)[1][0].detach()

    return level.sigma**2 * task.in_batches(trace, x).double().cpu() / x[0].numel()


def _asymmetry(ahead: Tensor, back: Tensor) -> Estimate:
    """|J - J^T|/|J| in the Frobenius norm, from J v and J^T v [B, K, d] of random v: the mean
    squares of |(J - J^T) v| and of |J v| and |J^T v|.
    """
    square = lambda v: v.double().square().sum(2).mean(1).cpu()
    size = (square(ahead) + square(back)) / 2
    return estimates.root(estimates.ratio(square(ahead - back), size, len(ahead)))


def _top_vector(apply: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Of a symmetric matrix, the unit vector [B, 1, d] with the largest v^T A v within a Krylov
    space of start [B, 1, d]: that is at most the largest eigenvalue, and close to it if that stands
    apart from the others.
    """
    basis = start / start.norm(dim=2, keepdim=True)
    image = apply(basis)
    for _ in range(min(_KRYLOV, start.shape[2]) - 1):
        with plain(start.device):
            fresh = orthonormal(image[:, -1:], basis)
        basis, image = torch.cat([basis, fresh], 1), torch.cat([image, apply(fresh)], 1)
    with plain(start.device):
        small = (basis @ image.mT).double()
        weights = torch.linalg.eigh((small + small.mT) / 2).eigenvectors[:, :, -1:]
        top = weights.mT.to(basis.dtype) @ basis
        return top / top.norm(dim=2, keepdim=True)
