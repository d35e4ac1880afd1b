"""The Fisher information at x_t in all its forms: DF-EA (eq. 20), its relatives, the network's own,
the exact one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from .. import ops
from .._fisher_operator import FisherOperator
from .._torch import check
from .._torch.objects import Watched
from .._torch.shapes import column
from ..fisher import DiffusionFisher
from ..law import Law
from ..schedule._base import as_tensor
from ._calls import checked
from ._derivatives import explained
from .denoiser import Denoiser, expect_denoiser
from .trace_matching import MatchedTrace
from .traces import expect_same_levels

__all__ = ["FORMS", "bound", "fisher"]

T = TypeVar("T")
FORMS = ("paper", "centred", "isotropic", "exact", "jvp", "finite-difference", "vjp")


def fisher(
    form: str,
    x: Tensor,
    t: float | Tensor,
    denoiser: Denoiser,
    *,
    x0: Tensor | None = None,
    mean: Tensor | None = None,
    cloud: Law | None = None,
    trace: Callable[[Tensor, Tensor], Tensor] | None = None,
    **conditions: object,
) -> FisherOperator:
    """The Fisher information at x_t as a linear operator, exact or by one of its approximations.

    F = I/sigma^2 - (alpha^2/sigma^4) C = J_eps/sigma, J_eps = d eps/dx, with C or J_eps by one of:

        form                 F v                                             needs   a vector costs
        "paper"              C = x0 x0^T - mean mean^T (DF-EA, eq. 20)       x0      O(d)
        "centred"            C = r r^T, r = x0 - mean; with a trace, capped: x0      O(d)
                             |r|^2 <= tr C = (sigma^2/alpha^2)(d - sigma^2 tr F)
        "isotropic"          (tr F/d) v                                      trace   O(d)
        "exact"              the Fisher of the data set                      cloud   a pass over it
        "jvp"                J_eps v/sigma, forward mode, no graph                   a dual call
        "finite-difference"  (eps(x + h v) - eps(x - h v))/(2 h sigma)               two calls
        "vjp"                J_eps^T v/sigma, reverse mode                           call + backward

    When to trust them. "exact" is F itself for the law of the data set; a trained network
    approximates the law behind it, and at small sigma the two differ. The last three are the
    network's own: "vjp" is what autograd through a solver uses; "jvp" and "finite-difference" equal
    it as far as J_eps is symmetric, as it is for the true score. The others are guesses. Cosine to
    the true adjoint, and length relative to it, when each carries a random gradient from sigma =
    0.002 up to 2.3 (exact score, 100 DDIM steps; medians):

        data                                      "paper"     "centred"   "isotropic"
        16 atoms, d = 2                           .82, 4      .98, .4      .96, .9
        16 atoms, d = 8                           .82, 2      .99, .8      .95, .9
        8 Gaussians of deviation 0.3, d = 8       .26, 1e20   .90, .007    .98, 1
        8 Gaussians of deviation 0.3, d = 64      .09, 1e75   .08, 12     1.00, 1
        a Gaussian, variances 1 to 1e-4, d = 8    .42, 1e20   .61, .008    .67, .3
        a Gaussian, variances 1 to 1e-4, d = 64   .14, 1e70   .00, 10      .66, .3

    So: "isotropic" keeps every direction and about the right length; it is never far off. "centred"
    is best where single atoms explain the sample, and bad on smooth data in high dimension at noise
    below the data's own deviations, since it puts all of C into one direction; the cap only acts on
    an x0 that is not the path's own end. The paper's C is indefinite, depends on the origin, and
    amplifies without bound: for comparison.

    Args:
        form: one of FORMS.
        x: [B, *E], float32 or float64.
        t: float, [] or [B].
        denoiser: gives alpha, sigma and the predictions.
        x0: [B, *E], the end of the path that x lies on.
        mean: [B, *E], the posterior mean where it is known already: then the forms "paper" and
            "centred" call no network.
        cloud: the atoms, event shape E.
        trace: trace(x, t) -> tr F [B], such as a MatchedTrace.
        conditions: keyword arguments of the network. Where K vectors per query take K copies of x,
            tensors [B, ...] among them are repeated as x is.

    Arguments that a form does not need are ignored.

    CG needs at most three steps for the first three forms; on "centred", solve is the sound
    Levenberg-Marquardt step (a I - b r r^T)^{-1} v.

    A trained network's F is not quite symmetric: `T` swaps "jvp" and "vjp"; solve runs CG all the
    same, judges by the true residual and raises where the asymmetry keeps it above tol (it has
    derivatives in b, damping and x, none in the network's parameters); eigsh gives the pairs of (F
    + F^T)/2 up to d = 512, above that it raises as solve does.

    Returns:
        The operator, with `@`, trace() and diagonal() (closed forms for the first four, else d
        products), to_dense(), solve(b, damping) and eigsh(k).

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        NotImplementedError: Raised by a product in the form "jvp" where the network's attention has
            no forward-mode derivative, and in both modes where it checkpoints its activations.
    """
    check.choice("form", form, FORMS)
    expect_denoiser(denoiser)
    check.query("x", x)
    denoiser.warn_in_training("fisher")
    denoiser = denoiser.bind(**conditions)
    alpha, sigma = denoiser.levels(x, t)
    if form == "exact":
        return DiffusionFisher(x, _given("cloud", cloud, "a PointCloud", form), alpha, sigma)
    if form == "isotropic":
        trace = _given("trace", trace, "trace(x, t) -> tr F [B], e.g. a MatchedTrace,", form)
        return IsotropicFisher(x, alpha, sigma, _trace(trace, x, t, denoiser, sigma))
    if form in ("paper", "centred"):
        x0 = _given("x0", x0, f"the end of the path, shape {list(x.shape)},", form)
        check.like("x0", x0, "x", x)
        if mean is None:
            mean = denoiser.denoised(x, t)
        check.like("mean", mean, "x", x)
        if form == "centred" and trace is not None:
            x0 = _capped(x0, mean, alpha, sigma, _trace(trace, x, t, denoiser, sigma))
        return EndpointFisher(x, alpha, sigma, x0, mean, "paper" if form == "paper" else "centred")
    return NetworkFisher(x, alpha, sigma, denoiser, t, form)


def bound(
    alpha: float | Tensor, sigma: float | Tensor, eps_error: float | Tensor, radius: float
) -> float | Tensor:
    """A bound on the error of the form "paper" (DF-EA) in the Hilbert-Schmidt norm:

    |F - F_paper| <= 2 alpha^2 D^2/sigma^4 + 2 alpha D delta/sigma^3 + delta^2/sigma^2.

    Prop. 8, corrected: the printed bound is exceeded sevenfold by two atoms at sigma = 0.05.

    Args:
        alpha, sigma: the levels.
        eps_error: delta = |eps_theta - eps|, the network's error at x (2-norm).
        radius: D, the largest norm in the data, |x0| included.
    """
    return (
        2 * (alpha * radius / sigma**2) ** 2
        + 2 * alpha * radius * eps_error / sigma**3
        + (eps_error / sigma) ** 2
    )


class EndpointFisher(FisherOperator):
    """F = I/sigma^2 - (alpha^2/sigma^4) C with C = x0 x0^T - mean mean^T ("paper") or
    (x0 - mean)(x0 - mean)^T ("centred").
    """

    x0, mean = Watched[Tensor](), Watched[Tensor]()

    def __init__(
        self,
        x: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        x0: Tensor,
        mean: Tensor,
        form: Literal["paper", "centred"],
    ) -> None:
        super().__init__(x, alpha, sigma)
        self.x0, self.mean, self.form = x0, mean, form

    def __repr__(self) -> str:
        return _with_form(super().__repr__(), self.form)

    def parameters(self) -> tuple[Tensor, ...]:
        return self.x0, self.mean, self.alpha, self.sigma

    def rebuild(self, *parameters: Tensor) -> EndpointFisher:
        x0, mean, alpha, sigma = parameters
        return EndpointFisher(self.x, alpha, sigma, x0, mean, self.form)

    def __matmul__(self, v: Tensor) -> Tensor:
        return ops.endpoint_matvec(v, self.x0, self.mean, self.alpha, self.sigma, self.form)

    def apply(self, v: Tensor) -> Tensor:
        return (self @ v.view(*v.shape[:2], *self.event_shape)).reshape(v.shape)

    def diagonal(self) -> Tensor:
        alpha, sigma = column(self.alpha, self.x), column(self.sigma, self.x)
        if self.form == "paper":
            diagonal = self.x0.square() - self.mean.square()
        else:
            diagonal = (self.x0 - self.mean).square()
        return (1 - (alpha / sigma) ** 2 * diagonal) / sigma**2


class IsotropicFisher(FisherOperator):
    """The form "isotropic", F = (tr F/d) I."""

    _trace = Watched[Tensor]()

    def __init__(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, trace: Tensor
    ) -> None:
        super().__init__(x, alpha, sigma)
        self._trace = trace

    def parameters(self) -> tuple[Tensor, ...]:
        return (self._trace,)

    def rebuild(self, *parameters: Tensor) -> IsotropicFisher:
        return IsotropicFisher(self.x, self.alpha, self.sigma, *parameters)

    def apply(self, v: Tensor) -> Tensor:
        return self._trace[:, None, None] / self.d * v

    def trace(self) -> Tensor:
        return self._trace.clone()

    def diagonal(self) -> Tensor:
        return self @ torch.ones_like(self.x)


class NetworkFisher(FisherOperator):
    """The network's own F, F v = J v/sigma or J^T v/sigma, J = d eps/dx of the denoiser."""

    def __init__(
        self,
        x: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        denoiser: Denoiser,
        t: float | Tensor,
        form: str,
    ) -> None:
        super().__init__(x, alpha, sigma)
        self.denoiser, self.t, self.form = denoiser, t, form

    def __repr__(self) -> str:
        return _with_form(super().__repr__(), self.form)

    def parameters(self) -> tuple[Tensor, ...]:
        return (self.x,)

    def rebuild(self, *parameters: Tensor) -> NetworkFisher:
        (x,) = parameters
        return NetworkFisher(x, self.alpha, self.sigma, self.denoiser, self.t, self.form)

    @property
    def T(self) -> NetworkFisher:
        """The transpose: "jvp" and "vjp" swapped."""
        form = "jvp" if self.form == "vjp" else "vjp"
        return NetworkFisher(self.x, self.alpha, self.sigma, self.denoiser, self.t, form)

    def apply(self, v: Tensor) -> Tensor:
        x, t, sigma, denoiser = self._repeated(v.shape[1])
        v_rows = v.reshape(x.shape).contiguous()

        def eps(x: Tensor) -> Tensor:
            return denoiser.eps(x, t)

        if self.form == "vjp":
            with explained("form", self.form):
                (product,) = torch.func.vjp(eps, x)[1](v_rows)
        elif self.form == "jvp":
            with explained("form", self.form):
                product = torch.func.jvp(eps, (x,), (v_rows,))[1]
        else:
            # the largest entry of h v is u^(1/3) sigma: truncation and rounding are then both
            # u^(2/3)
            size = v.abs().amax(2).flatten().clamp_min(torch.finfo(x.dtype).tiny)
            h = denoiser.rounding(x) ** (1 / 3) * sigma / size.view(sigma.shape)
            product = (eps(x + h * v_rows) - eps(x - h * v_rows)) / (2 * h)
        return (product / sigma).reshape(v.shape)

    def _repeated(self, k: int) -> tuple[Tensor, float | Tensor, Tensor, Denoiser]:
        """K copies of each query, time, sigma [B K, 1, ...] and condition, for one call of
        the network.
        """
        if k == 1:  # torch.func.jvp needs it contiguous
            x, t, denoiser = self.x.contiguous(), self.t, self.denoiser
        else:
            x, t = self.x.repeat_interleave(k, 0), self.t
            if isinstance(t, Tensor) and t.ndim:
                t = t.repeat_interleave(k, 0)
            per_query = {
                name: value.repeat_interleave(k, 0)
                for name, value in self.denoiser.conditions.items()
                if isinstance(value, Tensor) and value.ndim and len(value) == len(self.x)
            }
            denoiser = self.denoiser.bind(**per_query)
        sigma = column(self.sigma.repeat_interleave(k, 0), x)
        return x, t, sigma, denoiser


def _with_form(representation: str, form: str) -> str:
    return f"{representation[:-1]}, form={form!r})"


def _capped(x0: Tensor, mean: Tensor, alpha: Tensor, sigma: Tensor, trace: Tensor) -> Tensor:
    """x0 brought so close to the mean that alpha^2 |r|^2 <= alpha^2 tr C = sigma^2 (d - sigma^2
    tr F), r = x0 - mean.
    """
    r = x0 - mean
    length = alpha * check.query("x0", r).norm(dim=1)
    longest = sigma * (r.shape[1:].numel() - sigma**2 * trace).clamp_min(0).sqrt()
    shrink = (longest / length.clamp_min(torch.finfo(r.dtype).tiny)).clamp_max(1)
    return mean + column(shrink, r) * r


def _trace(
    trace: Callable[..., Tensor], x: Tensor, t: float | Tensor, denoiser: Denoiser, like: Tensor
) -> Tensor:
    expect_same_levels(trace, denoiser.schedule, as_tensor("t", t))
    value = trace(x, t, **(denoiser.conditions if isinstance(trace, MatchedTrace) else {}))
    return checked("trace", value, like, as_tensor("t", t).expand(like.shape))


def _given(name: str, value: T | None, expected: str, form: str) -> T:
    """An argument that the form needs."""
    if value is None:
        raise check.mismatch(name, f"{expected} for form {form!r}", "None")
    return value
