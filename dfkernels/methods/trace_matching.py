"""DF-TM: tr F from a scalar network that is trained by regression, beside a denoiser.

    residual: m ~ E|eps - eps_theta|^2/d;  tr F ~ (d/sigma^2)(1 - m)
    noise:    m ~ E|eps|^2/d;              tr F ~ (d (1 - m) + |eps_theta|^2)/sigma^2
    paper:    m ~ E|x_0|^2/d;              tr F ~ d/sigma^2
                                                  - (alpha^2/sigma^4)(d m - |ybar_theta|^2)
                                           (eq. 17)

Prefer "residual": an error of eps_theta enters at second order. "noise" is eq. 17 about the origin
x/alpha: the error enters at first order; needs no eps_theta to train. "paper" is a difference of
two numbers that agree to a relative sigma^2: its regression has noise of size 2 |x| sigma/d where
the answer is of size sigma^2. Trust it for sigma/alpha of the order of the data's standard
deviation and above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._torch import check
from .._torch.shapes import column, flat
from ..schedule import Schedule
from ..schedule._base import as_tensor
from ._calls import call, checked
from .denoiser import Denoiser
from .grid import noise_range
from .networks import gaussian_power

__all__ = ["FORMS", "MatchedTrace", "Noisy", "bound", "denoising_loss", "diffuse", "trace_loss"]

FORMS = ("residual", "noise", "paper")
TraceNetwork = Callable[..., Tensor]


class Noisy(NamedTuple):
    """Noisy data x = alpha x_0 + sigma eps, and the targets of a regression at x."""

    x: Tensor  # [B, *E]
    t: Tensor  # [B], float64
    alpha: Tensor  # [B]
    sigma: Tensor  # [B]
    x_0: Tensor  # [B, *E]: a draw given x, or the mean of draws
    eps: Tensor  # [B, *E]: the same of the noise
    variance: Tensor  # [B]: the sum of the squares of eps that its mean leaves out; 0 for a draw


def diffuse(
    schedule: Schedule,
    x_0: Tensor,
    generator: torch.Generator,
    noise: tuple[float, float],
    queries: int | None = None,
) -> Noisy:
    """Adds noise to a batch of data, at levels log-uniform in `noise` and stratified: one in each
    of B equal parts.

    Args:
        schedule: maps t to alpha and sigma.
        x_0: [N, *E]; in random order where `queries` is given.
        generator: of levels and noise.
        noise: range of sigma/alpha.
        queries: None: B = N, and the targets are the draws themselves. An integer B <= N: only the
            first B rows are diffused, and the targets are means given x over all N rows (one pass
            of ops.posterior). Since each x came from one of the rows, this is Rao-Blackwell:
            expected gradients stay, exactly, and a target's variance falls by the number of rows
            that share the weight. Take N well above B: the queries share their rows. Worth its
            N B d operations in few dimensions, where many rows share the weight.

    Raises:
        ValueError: `noise` is no range 0 < noise[0] < noise[1], or the schedule does not reach it.
    """
    check.query("x_0", x_0)
    low, high = noise_range(noise)
    if queries is not None:
        queries = check.integer("queries", queries, 1, len(x_0))
    rows = x_0[:queries]
    n = len(rows)
    wide = {"dtype": torch.float64, "device": x_0.device}
    u = (torch.arange(n, **wide) + torch.rand(n, generator=generator, **wide)) / max(1, n)
    t = schedule.t_of_log_snr(-2 * (math.log(low) + u * math.log(high / low)))
    eps = torch.randn(rows.shape, dtype=x_0.dtype, device=x_0.device, generator=generator)
    alpha, sigma = (level.to(x_0.dtype) for level in schedule(t))
    x = column(alpha, x_0) * rows + column(sigma, x_0) * eps
    if queries is None:
        return Noisy(x, t, alpha, sigma, rows, eps, torch.zeros_like(alpha))
    at = ops.posterior(x, x_0, alpha, sigma)
    variance = x.shape[1:].numel() - sigma**2 * at.fisher_trace  # tr Cov_w(u)
    mean_eps = (x - column(alpha, x) * at.mean) / column(sigma, x)
    return Noisy(x, t, alpha, sigma, at.mean, mean_eps, variance)


def _diffused(
    denoiser: Denoiser,
    x_0: Tensor,
    generator: torch.Generator,
    noise: tuple[float, float],
    queries: int | None,
) -> Noisy:
    if queries is not None and denoiser.conditions:
        # the means would mix rows of different conditions
        names = ", ".join(denoiser.conditions)
        raise check.mismatch("queries", f"None with conditions ({names})", queries)
    return diffuse(denoiser.schedule, x_0, generator, noise, queries)


def denoising_loss(
    denoiser: Denoiser,
    x_0: Tensor,
    generator: torch.Generator,
    *,
    noise: tuple[float, float],
    std: float | None = None,
    queries: int | None = None,
) -> Tensor:
    """The training loss of a denoiser, whatever its network predicts, a scalar: the mean of

        w_t |eps_theta(x_t, t) - eps|^2/d

    w_t = 1 + sigma^2/(alpha std)^2 is one over the variance of eps given x_t for data of standard
    deviation std (EDM's weighting); std = None: w_t = 1.

    Args:
        denoiser: what is trained; conditions of its network by `denoiser.bind(label=label)`.
        x_0: [N, *E], a batch of data.
        generator: of levels and noise.
        noise, queries: range of sigma/alpha, rows to diffuse: see `diffuse`.
        std: of the data, one number.

    Raises:
        TypeError, ValueError: An argument or the network's output is wrong; the message names it.
    """
    at = _diffused(denoiser, x_0, generator, noise, queries)
    std = None if std is None else check.positive("std", std)
    square = flat(denoiser.eps(at.x, at.t) - at.eps).square().mean(1)
    weight = 1.0 if std is None else 1 + (at.sigma / (at.alpha * std)) ** 2
    return _mean(weight * square)


def trace_loss(
    network: TraceNetwork,
    denoiser: Denoiser,
    x_0: Tensor,
    generator: torch.Generator,
    *,
    noise: tuple[float, float],
    form: str = "residual",
    mean: float | None = None,
    std: float | None = None,
    queries: int | None = None,
) -> Tensor:
    """The training loss of a trace network: the mean of ((m(x_t, t) - target)/guess)^2, a scalar.

    The target is |eps - eps_theta|^2/d ("residual"), |eps|^2/d ("noise") or |x_0|^2/d ("paper",
    Algorithm 1).

    guess is the exact m of data N(mean, std^2 I); std = None: 1. Compared with weights that make
    the targets' noise uniform, this spends less where that noise drowns the answer: small sigma in
    the paper's form, large sigma in the noise form. The denoiser is frozen; only the residual form
    calls it.

    Args:
        network: `network(x, t)`, x [B, *E], t [B] in the network's dtype -> m [B]; it gets the
            keyword arguments that the denoiser is bound to.
        x_0: [N, *E], a batch of data.
        noise, queries: range of sigma/alpha, rows to diffuse: see `diffuse`.
        mean: of the data, for a guess that depends on it: with std, and not of "residual"; None: 0.

    Raises:
        TypeError, ValueError: An argument is wrong, or the output of the `trace network` is not
            [B], finite and of x's dtype.
    """
    check.choice("form", form, FORMS)
    if std is None or form == "residual":
        check.unused("mean", mean, "with form='residual' or without std: the guess has none")
    mean = 0.0 if mean is None else check.constant("mean", mean)
    std = None if std is None else check.positive("std", std)
    at = _diffused(denoiser, x_0, generator, noise, queries)
    m = _values(network, at.x, at.t, denoiser.conditions)
    d = at.x.shape[1:].numel()
    if form == "residual":
        with torch.no_grad():
            mean_target, variance = denoiser.eps(at.x, at.t) - at.eps, at.variance
    elif form == "noise":
        mean_target, variance = at.eps, at.variance
    else:
        mean_target, variance = at.x_0, (at.sigma / at.alpha) ** 2 * at.variance
    target = (flat(mean_target).square().sum(1) + variance) / d
    if std is None:
        guess = 1.0
    elif form == "residual":
        guess = 1 / (1 + (at.sigma / (at.alpha * std)) ** 2)
    else:
        guess = gaussian_power(form, at.x, at.alpha, at.sigma, mean, std)[0]
    return _mean(((m - target) / guess).square())


class MatchedTrace:
    """tr F from one call of a trained trace network, at x [B, *E] and t (a number, [] or [B]).

    >>> trace = MatchedTrace(network, denoiser)
    >>> trace(x, t)  # tr F, [B]
    >>> log_prob(denoiser, x, (0.01, 50.0), trace)

    Args:
        network: `network(x, t, **conditions)` -> m [B], trained by `trace_loss` with the same
            denoiser and form.
        denoiser: what it was trained with. All but the residual form call it once, unless eps is
            given.
        form: one of FORMS.

    An estimate as good as its training: `bound` says how errors of the two networks enter. It
    learns the trace of the law that the training set was drawn from, not that of its atoms, as far
    as it generalises.
    """

    def __init__(self, network: TraceNetwork, denoiser: Denoiser, form: str = "residual") -> None:
        check.function("network", network, "a callable network(x, t)")
        check.choice("form", form, FORMS)
        self.network, self.denoiser, self.form = network, denoiser, form

    def __repr__(self) -> str:
        name = getattr(self.network, "__name__", type(self.network).__name__)
        return f"MatchedTrace({name}, {self.denoiser.short}, form={self.form!r})"

    def __call__(
        self, x: Tensor, t: float | Tensor, eps: Tensor | None = None, **conditions: object
    ) -> Tensor:
        """tr F, [B].

        Args:
            x: [B, *E], float32 or float64.
            t: a number, [] or [B].
            eps: [B, *E], the denoiser's noise prediction at x and t, where it is known already.
            conditions: keyword arguments of both networks.
        """
        denoiser = self.denoiser.bind(**conditions)
        alpha, sigma = denoiser.levels(x, t)
        times = as_tensor("t", t).to(x.device, torch.float64).expand(len(x))
        m = _values(self.network, x, times, denoiser.conditions)
        if self.form == "residual":
            return ops.matched_trace(m, x, alpha, sigma)  # eps would only say what shape x has
        eps = denoiser.eps(x, t) if eps is None else eps
        if self.form == "noise":
            return ops.matched_trace(m, eps, alpha, sigma) + flat(eps).square().sum(1) / sigma**2
        return ops.matched_trace(m, eps, alpha, sigma, x=x, form="paper")


def bound(
    alpha: float | Tensor,
    sigma: float | Tensor,
    d: int,
    trace_error: float | Tensor,
    eps_error: float | Tensor,
    *,
    form: str = "residual",
    radius: float | Tensor | None = None,
) -> float | Tensor:
    """A bound on the error of MatchedTrace, from the errors of its networks (Prop. 7, corrected).

        residual: d d1/sigma^2 + d2^2/sigma^2
        noise:    d d1/sigma^2 + (2 R/sigma^2) d2 + d2^2/sigma^2
        paper:    (alpha^2 d/sigma^4) d1 + (2 alpha D_y/sigma^3) d2 + d2^2/sigma^2

    The printed Prop. 7 lacks the term with D_y and is too small by orders of magnitude.

    Args:
        alpha, sigma: the levels.
        d: the dimension.
        trace_error: d1, the largest error of the trace network.
        eps_error: d2, the largest error of the noise prediction in the 2-norm.
        form: one of FORMS.
        radius: D_y, the largest |y| in the data, for "paper"; R, the norm of the exact noise
            prediction, for "noise".
    """
    check.choice("form", form, FORMS)
    if (radius is None) == (form != "residual"):
        expected = "a number" if radius is None else "None"
        raise check.mismatch("radius", f"{expected} with form={form!r}", radius)
    second_order = eps_error**2 / sigma**2
    if radius is None:
        return d * trace_error / sigma**2 + second_order
    first_order = 2 * radius * eps_error / sigma**2
    if form == "noise":
        return d * trace_error / sigma**2 + first_order + second_order
    ratio = alpha / sigma
    return ratio**2 * d * trace_error / sigma**2 + ratio * first_order + second_order


def _values(network: TraceNetwork, x: Tensor, t: Tensor, conditions: dict[str, object]) -> Tensor:
    out = call(network, x, t, conditions, "trace network")
    return checked("trace network", out, x.new_empty(len(x)), t)


def _mean(x: Tensor) -> Tensor:
    """The mean over the batch; 0 for an empty one, which then changes no weight."""
    return x.sum() / max(1, len(x))
