"""log q_t, posterior mean, Fisher trace and effective number of atoms in one pass over the atoms.

u_i = (x - alpha y_i)/sigma,  w_i = softmax_i(log pi_i - |u_i|^2/2),  log pi normalised
log_prob = logsumexp_i(log pi_i - |u_i|^2/2) - (d/2) log(2 pi sigma^2)
mean = sum_i w_i y_i        ess = 1/sum_i w_i^2
fisher_trace = (d - (alpha/sigma)^2 tr C)/sigma^2,  C the posterior covariance
(Prop. 5, eq. 16)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import check, diagnosis, library
from ..._torch.types import Level
from ..common import derivatives, lists, moments
from ..common.about_mean import about_mean, log_density
from ..common.derivatives import Stored
from ..common.moments import Inputs, first_moment, half_square, weight_sum
from .reference import posterior as reference

__all__ = ["Posterior", "posterior", "reference"]


class Posterior(NamedTuple):
    """What one pass over the atoms gives: log_prob [B], mean [B, *E], fisher_trace [B], ess [B];
    of a batched call, with [G, B] in place of [B]."""

    log_prob: Tensor
    mean: Tensor
    fisher_trace: Tensor
    ess: Tensor

    def score(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """grad_x log q_t = -(x - alpha mean)/sigma^2, [B, *E], for the arguments of the call."""
        return -self.eps(x, alpha, sigma) / self._column(check.sigma, sigma, x)

    def eps(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """The ideal noise prediction (x - alpha mean)/sigma, [B, *E], for the arguments of the
        call."""
        left = x - self._column(check.alpha, alpha, x) * self.mean
        return left / self._column(check.sigma, sigma, x)

    def _column(self, checked: Callable[..., Tensor], level: Level, x: Tensor) -> Tensor:
        """Levels in a shape that goes with x."""
        lead = self.log_prob.shape
        return checked(level, x, batched=len(lead) == 2).reshape(
            *lead, *[1] * (x.dim() - len(lead))
        )


def _sums(e: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """sum e, sum e t, sum e |t|^2, sum e^2."""
    weight, first = weight_sum(e), first_moment(e, t)
    return weight, first, (e * (t * t).sum(-1)).sum(1), (e * e).sum(1)


KIND = moments.register(
    moments.MomentKind(
        name="posterior",
        sums=_sums,
        shapes=lambda x: (x.shape[:1], x.shape, x.shape[:1], x.shape[:1]),
    )
)


def _finish(z: Inputs, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's results from the sums about z.reference."""
    d = z.x.shape[1]
    weight, first, square, weight_square = sums
    delta = first / weight[:, None]
    variance = square / weight - (delta * delta).sum(1)
    trace = (d - (z.alpha / z.sigma) ** 2 * variance) / (z.sigma * z.sigma)
    log_prob = log_density(z, weight)
    return log_prob, z.reference + delta, trace, weight * weight / weight_square


def _differentiable(x, y, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None):
    """The op in differentiable form."""
    stored = Stored(scale, offset, atoms, counts)
    return _finish(*about_mean(KIND, x, y, alpha, sigma, log_prior, stored))


def _shift_and_reference(x, y, alpha, sigma, log_pi, scale, offset) -> tuple[Tensor, Tensor]:
    """log sum_i exp(logit_i) [B], float64, and the mean [B, d] by a streaming softmax in PyTorch,
    with moments about the heaviest atom so far."""
    B, d = x.shape
    max_logit, total = x.new_full((B,), -math.inf), x.new_zeros(B)
    reference, first = x.new_zeros(B, d), x.new_zeros(B, d)
    for q, atom_tiles in derivatives.tiles(B, y.shape[0], d):
        for atoms in atom_tiles:
            t = moments.load(y[atoms], x.dtype, scale, offset)
            logits = moments.logits(x[q], t, alpha[q], sigma[q], log_pi[atoms])
            largest, heaviest = logits.max(1)
            new = torch.maximum(max_logit[q], largest)
            safe = torch.where(new == -math.inf, 0.0, new)  # masked atoms only, so far
            heavier = (largest > max_logit[q])[:, None]
            new_reference = torch.where(heavier, t[heaviest], reference[q])
            e, down = torch.exp(logits - safe[:, None]), torch.exp(max_logit[q] - safe)
            t, _ = moments.without_weightless(e, t, log_pi[atoms], new_reference)
            before = first[q] + total[q, None] * (reference[q] - new_reference)
            first[q] = first_moment(e, t - new_reference[:, None]) + torch.where(
                (down > 0)[:, None], down[:, None] * before, 0.0
            )
            total[q] = down * total[q] + weight_sum(e)
            max_logit[q], reference[q] = new, new_reference
    return max_logit.double() + torch.log(total), reference + first / total[:, None]


def _fallback(x, y, alpha, sigma, log_prior, scale, offset):
    prior = x.new_zeros(y.shape[0]) if log_prior is None else log_prior
    log_pi = torch.log_softmax(prior, 0)
    shift, reference = _shift_and_reference(x, y, alpha, sigma, log_pi, scale, offset)
    shift = shift + half_square(x, alpha, sigma, reference)
    z = Inputs(x, y, alpha, sigma, log_pi, shift, reference)
    return _finish(z, derivatives.pair_sums(KIND, z, Stored(scale, offset)))


def _fake(x, y, alpha, sigma, log_prior, scale, offset):
    B = x.shape[0]
    return x.new_empty(B), x.new_empty(x.shape), x.new_empty(B), x.new_empty(B)


op = lists.define(
    "posterior",
    "(Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, float scale, "
    "float offset, Tensor? atoms=None, Tensor? counts=None) -> (Tensor, Tensor, Tensor, Tensor)",
    fallback=_fallback,
    fake=_fake,
    cuda=library.in_triton(__name__),
    lists_on_cuda=True,
    differentiable=_differentiable,
    density=True,
)


def posterior(
    x: Tensor,
    y: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
    atoms: Tensor | None = None,
    counts: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
    batched: bool = False,
) -> Posterior:
    """Computes log q_t, posterior mean, Fisher trace and ESS of a diffused data set, in one pass.

    q_t is the law of alpha y + sigma eps, where y is an atom drawn with the probabilities of
    log_prior and eps standard normal noise (Prop. 5, eq. 16). Take care which of x and y is which:
    swapped, the call runs and returns something else.

    Args:
        x: Queries ``[B, *E]``, float32 or float64: the compute dtype, and that of every output.
        y: Atoms ``[N, *E]``, stored as x.dtype, float32, float16, bfloat16 or uint8; their values
            are scale * y + offset.
        alpha: Signal level of each query, a number or [B]; 0 is legal (pure noise).
        sigma: Noise level of each query, a number or [B], positive.
        log_prior: Log weights [N], None for uniform ones; any constant may be added to them. -inf
            masks an atom: neither results nor derivatives see what it holds, NaN included.
        scale: Factor of the stored atoms.
        offset: What is added to them.
        atoms: Lists of atoms, int64 [M]: the row numbers that each query counts, each query's
            ascending, one query after another. None: every query counts all atoms.
        counts: How many of them each query has, int64 [B], at least one; goes with atoms.
        kept: (atoms, counts); deprecated, write the two arguments.
        batched: Whether this is one call for G data sets: x ``[G, B, *E]``, y ``[G, N, *E]``,
            log_prior [G, N], alpha and sigma a number, [G, B] or [G, 1]; every output has [G, B] in
            place of [B]. Query x[g, b] counts the atoms y[g]. y or log_prior without the leading
            dimension is that of all data sets. There are no lists of atoms then.

    Returns:
        Posterior(log_prob [B], mean ``[B, *E]``, fisher_trace [B], ess [B]), differentiable to any
        order in x, y, alpha, sigma and log_prior. In reverse mode, log_prob in x, alpha and sigma
        costs no further pass over the atoms; other first derivatives take one, in y or log_prior
        and others together two; forward mode takes one for all outputs and arguments. Second
        derivatives are slow, but for those of log_prob and the mean in x.

    Raises:
        TypeError: An argument has a type or dtype that it cannot have; the message names it.
        ValueError: So for a shape, a device or a value, under transforms and from a compiled graph
            as well. On the CPU, NaN or inf among the arguments, or an overflow, is found by the
            kernels. On CUDA nothing synchronises: NaN in, NaN out.
    """
    args = check.points(x, y, alpha, sigma, log_prior, scale, offset, batched)
    args += lists.arguments(atoms, counts, kept, args[0], batched)
    given = {"x": x, "y": y, **check.given_levels(alpha, sigma, batched)}
    log_prob, mean, trace, ess = diagnosis.call(op, args, **given)
    if batched:
        log_prob, trace, ess = (o.reshape(x.shape[:2]) for o in (log_prob, trace, ess))
    same = x.dim() == 2 and not batched
    return Posterior(log_prob, mean if same else mean.reshape(x.shape), trace, ess)
