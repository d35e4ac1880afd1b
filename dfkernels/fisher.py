"""The Fisher information of a law of data at the queries, with what else one pass over the atoms
gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from ._fisher_operator import FisherOperator
from ._torch import check
from ._torch.objects import cached, cached_without_graph, ordinary
from .certified.certificate import Certificate
from .cloud import PointCloud
from .law import Law, checked_law, checked_tolerance

__all__ = ["DiffusionFisher"]

# a cloud of fewer numbers, or of shorter atoms, is read as fast as it is searched
_NUMBERS, _LENGTH = 1 << 21, 512


class _Part(NamedTuple):
    """Queries that are computed together, and the lists (atoms, counts) of what they count; None
    for all atoms.
    """

    queries: slice | Tensor
    lists: tuple[Tensor, Tensor] | None


class DiffusionFisher(FisherOperator):
    """The Fisher information of a data set at each query, with the density, the score and the ideal
    denoiser: F = I/sigma^2 - (alpha^2/sigma^4) Cov(y | x) (Prop. 1, eq. 11), a linear operator that
    is not formed unless you ask for it.

    Args:
        x: [B, *E], float32 or float64; the computation follows its dtype.
        cloud: the data, a `PointCloud`, a `ShardedCloud` or a `GaussianMixture`, event shape E, on
            x's device. Of a mixture, F <= I/(sigma^2 + alpha^2 v), v the least variance of a
            component.
        alpha, sigma: float, 0-d or [B]; sigma > 0.
        tolerance: None for all atoms; eps in (0, 1) leaves out atoms that together carry less than
            eps of the posterior weight, certainly, and need not be read (the cloud has to have an
            index: `cloud.index()`). `dropped_mass` bounds what was left out, `log_prob_error`,
            `mean_error` and `fisher_error` what follows for the results. Derivatives are those of
            the selected atoms. Fast at low noise; where most atoms carry weight all are taken, as
            from clouds of fewer than 2^21 numbers or d < 512.

    F is symmetric, at most I/sigma^2, and may be indefinite. An eigenpair (l, v) of F is one of the
    posterior covariance, with eigenvalue (sigma^2/alpha^2)(1 - sigma^2 l): the directions of
    largest posterior variance are those of the smallest eigenvalues of F.

    Everything is computed when first asked for, and kept. You get a copy, which you may change in
    place; one that needs a graph has it, even if the result was first asked for under no_grad. All
    results belong to the x, alpha, sigma and atoms that F was made from: if you change one of these
    tensors in place afterwards, the next use raises RuntimeError (a change through NumPy or `.data`
    goes unseen). A level of another dtype than x's is converted at once: what becomes of it
    afterwards has no influence, requires_grad_ included. Results share a graph: to go backward
    through several of them, one after the other, takes retain_graph=True. torch.compile breaks its
    graph here: with fullgraph=True call the ops.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it. Types, shapes and numbers
            are checked by the constructor, values of tensors at the first use.
    """

    def __init__(
        self,
        x: Tensor,
        cloud: Law,
        alpha: float | Tensor,
        sigma: float | Tensor,
        *,
        tolerance: float | None = None,
    ) -> None:
        checked_law("cloud", cloud)
        super().__init__(x, alpha, sigma)
        check.events("x", x, cloud.event_shape, "to match the cloud")
        self.cloud, self.tolerance = cloud, checked_tolerance(tolerance, cloud)

    def _unchanged(self) -> None:
        super()._unchanged()
        self.cloud._unchanged()

    @property
    def _points(self) -> PointCloud:
        """The data set, where there is a tolerance."""
        assert isinstance(self.cloud, PointCloud)  # no other law has an index
        return self.cloud

    @property
    def _width(self) -> Tensor:
        return self.cloud._width(self.alpha.detach(), self.sigma.detach())

    def parameters(self) -> tuple[Tensor, ...]:
        return self.x, self.alpha, self.sigma

    def rebuild(self, *parameters: Tensor) -> DiffusionFisher:
        x, alpha, sigma = parameters
        return DiffusionFisher(x, self.cloud, alpha, sigma, tolerance=self.tolerance)

    @cached_without_graph
    def _certificate(self) -> Certificate | None:
        """What is certain, where the cloud itself finds the atoms that count, as a `ShardedCloud`
        does; None where `_selected` does.
        """
        if self.tolerance is None or len(self.x) == 0:
            return None
        x, alpha, sigma = (t.detach() for t in (self.x, self.alpha, self.sigma))
        return self.cloud._certificate(x, alpha, sigma, self.tolerance)

    @cached_without_graph
    def _selected(self) -> tuple[list[_Part], Tensor]:
        """The parts of the batch, and the bound on what their lists leave out, [B]."""
        if self._certificate is not None:
            return [_Part(slice(None), None)], self._certificate.dropped_mass()
        if self.tolerance is None or len(self.x) == 0 or _is_small(self._points):
            return [_Part(slice(None), None)], self.x.new_zeros(len(self.x), dtype=torch.float64)
        levels = (self.alpha, self.sigma)
        atoms, counts, dropped = self._points._select(self.x, *levels, self.tolerance)
        found = counts >= 0
        if not bool(found.all()) and bool(found.any()):
            sparse, dense = found.nonzero()[:, 0], (~found).nonzero()[:, 0]
            return [_Part(sparse, (atoms, counts[found])), _Part(dense, None)], dropped
        return [_Part(slice(None), (atoms, counts) if bool(found[0]) else None)], dropped

    def _compute(self, method: Callable, *v: Tensor) -> tuple[Tensor, ...]:
        """The outputs of a method of the law of the data, part by part."""
        parts, outs = self._selected[0], []
        for queries, lists in parts:
            x, alpha, sigma, *vectors = (self.x, self.alpha, self.sigma, *v)
            if lists is not None or len(parts) > 1:
                x, alpha, sigma, *vectors = (t[queries] for t in (x, alpha, sigma, *vectors))
            given = {} if lists is None else dict(zip(("atoms", "counts"), lists, strict=True))
            if self._certificate is not None:
                given = {"tolerance": self.tolerance}
            out = method(x, *vectors, alpha, sigma, **given)
            outs.append((out,) if isinstance(out, Tensor) else tuple(out))
        if len(parts) == 1:
            return outs[0]
        order = torch.cat([q for q, _ in parts if isinstance(q, Tensor)]).argsort()
        return tuple(torch.cat(o)[order] for o in zip(*outs, strict=True))

    @cached
    def _posterior(self) -> ops.Posterior:
        return self.cloud._posterior_type(*self._compute(self.cloud.posterior))

    @property
    def dropped_mass(self) -> Tensor:
        """A bound on the share of the posterior weight that the atoms left out have, float64 [B]:
        below the tolerance, rounding included, and 0 where none are left out.
        """
        return self._selected[1].clone()

    @property
    def atoms_read(self) -> Tensor:
        """How many atoms each query's results were computed from, int64 [B]."""
        if self._certificate is not None:
            return self._certificate.selected.clone()
        read = self.x.new_full((len(self.x),), len(self.cloud), dtype=torch.int64)
        for queries, lists in self._selected[0]:
            if lists is not None:
                read[queries] = lists[1]
        return read

    @property
    def log_prob_error(self) -> Tensor:
        """A bound on the error of log_prob, float64 [B]: 0 <= log q - log_prob <= log(1 +
        dropped_mass), beside rounding.
        """
        return self.dropped_mass.log1p()

    @property
    def _radius(self) -> Tensor:
        """A bound R on the distance of any atom from the posterior mean, [B]: |mean - centre| +
        max |y - centre|.
        """
        if self.tolerance is None:
            return self.dropped_mass
        if self._certificate is not None:
            return self._certificate.reach(self._posterior.mean.detach())
        mean = self._posterior.mean.detach().flatten(1).double()
        found = self._points.index()
        return (mean - found.centre).norm(dim=1) + found.named_limits.radius

    @property
    def mean_error(self) -> Tensor:
        """A bound on the error of `denoised` in the 2-norm, float64 [B]: dropped_mass R, R = max_i
        |y_i - denoised|; beside rounding.
        """
        return self.dropped_mass * self._radius

    @property
    def fisher_error(self) -> Tensor:
        """A bound on the error of the trace and, in the 2-norm, of F, float64 [B]:
        (alpha^2/sigma^4) dropped_mass R^2, R as in `mean_error`; beside rounding.
        """
        ratio = self.alpha.detach().double() / self.sigma.detach().double() ** 2
        size = (ratio * self._radius) ** 2
        if self._certificate is not None:  # its R is that of the atoms left out alone
            trace = self._posterior.fisher_trace.detach().double()
            size = torch.maximum(size, self.d / self.sigma.detach().double() ** 2 - trace)
        return self.dropped_mass * size

    @property
    def log_prob(self) -> Tensor:
        """The log-density log q_t(x), [B], in nats."""
        return self._posterior.log_prob.clone()

    @property
    def denoised(self) -> Tensor:
        """The posterior mean of y given x, [B, *E]: the ideal denoiser."""
        return self._posterior.mean.clone()

    @property
    def ess(self) -> Tensor:
        """The effective number of atoms 1 / sum w_i^2, [B], in [1, N]. At 1, F = I/sigma^2 and says
        nothing about the data.
        """
        return self._posterior.ess.clone()

    @property
    def eps(self) -> Tensor:
        """The ideal noise prediction (x - alpha denoised)/sigma, [B, *E]."""
        return self.cloud._eps(self._posterior, self.x, self.alpha, self.sigma)

    @property
    def score(self) -> Tensor:
        """The gradient of log q_t at x, -eps/sigma, [B, *E]."""
        return self.cloud._score(self._posterior, self.x, self.alpha, self.sigma)

    def __repr__(self) -> str:
        tolerance = "" if self.tolerance is None else f", tolerance={self.tolerance:g}"
        return f"{super().__repr__()[:-1]}, {self.cloud!r}{tolerance})"

    def __matmul__(self, v: Tensor) -> Tensor:
        """F v for v [B, *E], or for K vectors per query, v [B, K, *E], at the cost of one pass."""
        self._rows("v", v)
        self._unchanged()
        return self._compute(self.cloud.fisher_matvec, ordinary(v))[0]

    def apply(self, v: Tensor) -> Tensor:
        """F v on flat vectors, [B, K, d] -> [B, K, d]."""
        return (self @ v.view(*v.shape[:2], *self.event_shape)).reshape(v.shape)

    def trace(self) -> Tensor:
        """tr F, [B] (Prop. 5, eq. 16)."""
        return self._posterior.fisher_trace.clone()

    @cached
    def _diagonal(self) -> Tensor:
        return self._compute(self.cloud.fisher_diagonal)[0]

    def diagonal(self) -> Tensor:
        """diag F, [B, *E]."""
        return self._diagonal.clone()

    @cached
    def _dense(self) -> Tensor:
        return self._compute(self.cloud.fisher_dense)[0]

    def to_dense(self) -> Tensor:
        """F as [B, d, d]. The object stores it and returns a copy: 2 B d^2 numbers of memory."""
        return self._dense.clone()

    def _enough(self, element: int) -> str:
        # every eigenvalue is <= 1/w^2, so the smallest is at least tr F - (d - 1)/w^2
        width, trace = self._width[element].item(), self._posterior.fisher_trace[element].item()
        enough = (self.d - 1) / width**2 - trace
        return f", more than (d - 1)/sigma^2 - tr F = {enough:.4g} is always enough"


def _is_small(cloud: PointCloud) -> bool:
    return cloud.y.numel() < _NUMBERS or cloud.d < _LENGTH
