"""log q_t, mean of x_0, score, Fisher trace and effective number of components of a Gaussian
mixture under noise.

    q_0 = sum_i pi_i N(y_i, diag(v_i)),  tau_i^2 = sigma^2 + alpha^2 v_i, coordinate by coordinate
    w_i = softmax_i(log pi_i - sum_k (log tau_ik + (x - alpha y_i)_k^2/(2 tau_ik^2)))
    s_i = -(x - alpha y_i)/tau_i^2          score = sum_i w_i s_i
    mean = sum_i w_i (y_i + (alpha v_i/tau_i^2) (x - alpha y_i)) = (x + sigma^2 score)/alpha
    fisher_trace = tr F,  F = diag(sum_i w_i/tau_i^2) - sum_i w_i (s_i - score)(s_i - score)^T
    (Prop. 3)
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from ..._torch import diagnosis, library
from ..._torch.types import Level
from ..common import mixture, moments
from ..common.moments import first_moment, weight_sum
from ..posterior import op as posterior
from .reference import mixture_posterior as reference

__all__ = ["MixturePosterior", "mixture_posterior", "reference"]


class MixturePosterior(NamedTuple):
    """What one call gives: log_prob [B], mean ``[B, *E]``, fisher_trace [B], ess [B], score
    ``[B, *E]``.

    The score is a result of its own: where sigma is far below the components' width,
    (alpha mean - x)/sigma^2 would lose its digits.
    """

    log_prob: Tensor
    mean: Tensor
    fisher_trace: Tensor
    ess: Tensor
    score: Tensor


def _sums(c: mixture.Terms, mean_reference: Tensor) -> tuple[Tensor, ...]:
    """sum e, sum e s, sum e |s|^2, sum e^2, sum e tr(1/tau^2), sum e m; s and m about the
    references."""
    e, s, precision, mean = c
    trace = precision.sum(-1) * (s.shape[-1] // precision.shape[-1])
    return (
        weight_sum(e),
        first_moment(e, s),
        (e * (s * s).sum(-1)).sum(1),
        (e * e).sum(1),
        (e * trace).sum(1),
        first_moment(e, mean - mean_reference.detach()[:, None]),
    )


KIND = moments.register(
    mixture.MixtureKind(
        name="mixture_posterior",
        sums=_sums,
        shapes=lambda x, *_: (x[:, 0].shape, x.shape, *[x.shape[:1]] * 3, x.shape),
        own=("variance", "mean_reference"),
    )
)


def _results(*args, differentiated: bool):
    z, mean, sums = mixture.sums(KIND, args, differentiated=differentiated)
    weight, first, square, weight_square, precision, mean_sum = sums
    delta = first / weight[:, None]
    trace = (precision - square) / weight + (delta * delta).sum(1)
    return (
        mixture.log_density(z, weight),
        mean + mean_sum / weight[:, None],
        trace,
        weight * weight / weight_square,
        z.reference + delta,
    )


def _fake(x, *_):
    B = x.shape[0]
    empty = x.new_empty
    return empty(B), empty(x.shape), empty(B), empty(B), empty(x.shape)


op = library.define(
    "mixture_posterior",
    "(Tensor x, Tensor y, Tensor variance, Tensor alpha, Tensor sigma, Tensor? log_prior, "
    "float scale, float offset) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fallback=partial(_results, differentiated=False),
    fake=_fake,
    differentiable=partial(_results, differentiated=True),
    shared=mixture.SHARED,
)


def _of_atoms(x, variance, alpha, tau, found) -> tuple[Tensor, ...]:
    """The results for components of one variance, which are those of atoms at noise tau, but for
    the mean: that of the atoms, drawn to x."""
    log_prob, mean, trace, ess = found
    score = -(x - alpha[:, None] * mean) / (tau * tau)[:, None]
    return log_prob, mean - alpha[:, None] * variance * score, trace, ess, score


def mixture_posterior(
    x: Tensor,
    y: Tensor,
    variance: Tensor | float,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> MixturePosterior:
    """Computes log q_t, mean of x_0, Fisher trace, ESS and score of a Gaussian mixture under noise.

    q_t is the law of alpha x_0 + sigma eps, where x_0 is drawn from the mixture
    q_0 = sum_i pi_i N(y_i, diag(v_i)) (Prop. 3): a fitted mixture, a kernel density estimate, or
    data with measurement errors of their own. With v = 0 it is `posterior`. Take care which of x
    and y is which: swapped, the call runs and returns something else.

    Args:
        x: Queries ``[B, *E]``, float32 or float64: the compute dtype, and that of every output.
        y: Means of the components ``[N, *E]``, stored as x.dtype, float32, float16, bfloat16 or
            uint8; their values are scale * y + offset.
        variance: Variances of the components, at least 0, in units of (scale * y + offset)^2: a
            number or [1], the same for all; [N], one for each component; ``[1, *E]``, a diagonal
            covariance that all share; ``[N, *E]``, a diagonal for each. 0 is a component that is
            one point.
        alpha: Signal level of each query, a number or [B]; 0 is legal (pure noise).
        sigma: Noise level of each query, a number or [B], positive.
        log_prior: Log weights [N], None for uniform ones; any constant may be added to them. -inf
            masks a component: neither results nor derivatives see what it holds, NaN included.
        scale: Factor of the stored means.
        offset: What is added to them.

    Returns:
        MixturePosterior(log_prob [B], mean ``[B, *E]``, fisher_trace [B], ess [B], score
        ``[B, *E]``), differentiable to any order in every tensor. Derivatives are tiled sums in
        PyTorch.

    Raises:
        TypeError: An argument has a type or dtype that it cannot have; the message names it.
        ValueError: So for a shape, a device or a value. On CUDA nothing synchronises: NaN in, NaN
            out.
    """
    args = mixture.arguments(x, y, variance, alpha, sigma, log_prior, scale, offset)
    given = mixture.given(args, x=x, y=y, variance=variance)
    if atoms := mixture.widened(args):
        found = diagnosis.call(posterior, atoms, **given)
        found = _of_atoms(args[0], args[2], atoms[2], atoms[3], found)
    else:
        found = diagnosis.call(op, args, **given)
    log_prob, mean, trace, ess, score = found
    return MixturePosterior(log_prob, mean.reshape(x.shape), trace, ess, score.reshape(x.shape))
