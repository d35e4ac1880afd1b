"""DiffusionFisher: F = -Hessian of log q_t at the queries, as a batch of linear operators, with what else the
pass gives.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from . import ops
from ._operator import FisherOperator
from .cloud import PointCloud

__all__ = ["DiffusionFisher"]


class DiffusionFisher(FisherOperator):
    """F = I/sigma^2 - (alpha^2/sigma^4) Cov(y | x) at each query (Prop. 1, eq. 11), never formed unless asked
    for.

    Args:
        x: [B, *E], float32 or float64; the computation follows its dtype.
        cloud: the atoms, event shape E, on x's device.
        alpha, sigma: float, 0-d or [B]; sigma > 0.

    F is symmetric, at most I/sigma^2, and may be indefinite. Everything is computed when first asked for, and
    kept; torch.compile breaks its graph here: with fullgraph=True call the ops. An eigenpair (l, v) of F is
    one of the posterior covariance, with eigenvalue (sigma^2/alpha^2)(1 - sigma^2 l): the directions of
    largest posterior variance are those of the smallest eigenvalues of F.

    Raises TypeError / ValueError naming the argument: from the constructor for types, shapes and numbers, for
    values of tensors from the first use.
    """

    def __init__(self, x: Tensor, cloud: PointCloud, alpha: float | Tensor, sigma: float | Tensor) -> None:
        if not isinstance(cloud, PointCloud):
            raise TypeError(
                f"cloud: expected a PointCloud, got {type(cloud).__name__}; wrap it: PointCloud(y)"
            )
        super().__init__(x, alpha, sigma)
        if x.shape[1:] != cloud.event_shape:
            expected = ", ".join(map(str, ("B", *cloud.event_shape)))
            raise ValueError(f"x: expected shape [{expected}] to match the cloud, got {list(x.shape)}")
        self.cloud = cloud

    @property
    def _given(self) -> tuple[Tensor, ...]:
        return self.x, self.alpha, self.sigma

    def _with(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> DiffusionFisher:
        return DiffusionFisher(x, self.cloud, alpha, sigma)

    def _args(self, *v: Tensor) -> tuple:
        return (self.x, self.cloud.y, *v, self.alpha, self.sigma, self.cloud.log_prior)

    @property
    def _affine(self) -> dict[str, float]:
        return {"scale": self.cloud.scale, "offset": self.cloud.offset}

    @cached_property
    def _posterior(self) -> ops.Posterior:
        return ops.posterior(*self._args(), **self._affine)

    @property
    def log_prob(self) -> Tensor:
        """log q_t(x), [B], in nats."""
        return self._posterior.log_prob

    @property
    def denoised(self) -> Tensor:
        """Posterior mean of y given x, [B, *E]: the ideal denoiser."""
        return self._posterior.mean

    @property
    def ess(self) -> Tensor:
        """1 / sum w_i^2, [B], in [1, N]: how many atoms matter. At 1, F = I/sigma^2 and says nothing about
        the data.
        """
        return self._posterior.ess

    @cached_property
    def eps(self) -> Tensor:
        """(x - alpha denoised)/sigma, [B, *E]: the ideal noise prediction."""
        return self._posterior.eps(self.x, self.alpha, self.sigma)

    @cached_property
    def score(self) -> Tensor:
        """Gradient of log q_t at x, [B, *E]: -eps/sigma."""
        return self._posterior.score(self.x, self.alpha, self.sigma)

    def __repr__(self) -> str:
        return f"DiffusionFisher(shape={tuple(self.shape)}, {self.dtype}, {self.device}, {self.cloud!r})"

    def __matmul__(self, v: Tensor) -> Tensor:
        """F v for v [B, *E], or for K vectors per query at the cost of one pass over the data, v [B, K,
        *E].
        """
        return ops.fisher_matvec(*self._args(v), **self._affine)

    def trace(self) -> Tensor:
        """tr F, [B] (Prop. 5, eq. 16)."""
        return self._posterior.fisher_trace

    @cached_property
    def _diagonal(self) -> Tensor:
        return ops.fisher_diagonal(*self._args(), **self._affine)

    def diagonal(self) -> Tensor:
        """diag F, [B, *E]."""
        return self._diagonal

    @cached_property
    def _dense(self) -> Tensor:
        return ops.fisher_dense(*self._args(), **self._affine)

    def to_dense(self) -> Tensor:
        """F as [B, d, d]; kept, so mind B d^2 numbers of memory."""
        return self._dense

    def _enough(self, query: int) -> str:
        # every eigenvalue is <= 1/sigma^2, so the smallest is at least tr F - (d - 1)/sigma^2
        enough = ((self.d - 1) / self.sigma[query] ** 2 - self.trace()[query]).item()
        return f", more than (d - 1)/sigma^2 - tr F = {enough:.4g} is always enough"
