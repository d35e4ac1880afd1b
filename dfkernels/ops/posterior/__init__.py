"""log q_t, posterior mean, Fisher trace and effective number of atoms in one pass over the atoms.

u_i = (x - alpha y_i)/sigma,  w_i = softmax_i(log pi_i - |u_i|^2/2),  log pi normalised
log_prob = logsumexp_i(log pi_i - |u_i|^2/2) - (d/2) log(2 pi sigma^2)
mean = sum_i w_i y_i        ess = 1/sum_i w_i^2
fisher_trace = (d - (alpha/sigma)^2 tr C)/sigma^2,  C the posterior covariance        (Prop. 5, eq.
16)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import check, library
from ..common import derivatives, lists
from ..common.moments import load, logits, without_the_weightless
from .reference import posterior as reference

__all__ = ["Posterior", "posterior", "reference"]


class Posterior(NamedTuple):
    """What one pass over the atoms gives: log_prob [B], mean [B, *E], fisher_trace [B], ess [B]."""

    log_prob: Tensor
    mean: Tensor
    fisher_trace: Tensor
    ess: Tensor

    def score(self, x: Tensor, alpha, sigma) -> Tensor:
        """grad_x log q_t = -(x - alpha mean)/sigma^2, [B, *E], at the x, alpha, sigma of the
        call."""
        return -self.eps(x, alpha, sigma) / _per_query("sigma", sigma, x)

    def eps(self, x: Tensor, alpha, sigma) -> Tensor:
        """The ideal noise prediction (x - alpha mean)/sigma, [B, *E], at the x, alpha, sigma of the
        call."""
        return (x - _per_query("alpha", alpha, x) * self.mean) / _per_query("sigma", sigma, x)


def _per_query(name, a, x):
    return check.per_query(name, a, x, positive=name == "sigma").reshape(-1, *[1] * (x.dim() - 1))


def _log_pi(log_prior, x, y):
    """log pi, normalised first: a large constant in log_prior would cost the logits their
    digits."""
    return torch.log_softmax(
        x.new_zeros(()).expand(y.shape[0]) if log_prior is None else log_prior, 0
    )


def anchored(x, y, alpha, sigma, log_prior, scale, offset):
    """The base tensors of the pair sums: shift and centre from a fused pass, without derivative."""
    args = [a.detach() if isinstance(a, Tensor) else a for a in (x, y, alpha, sigma, log_prior)]
    log_prob, mean, _, _ = op(*args, scale, offset)
    return [x, y, alpha, sigma, _log_pi(log_prior, x, y), log_prob + _log_norm(x, args[3]), mean]


def _log_norm(x, sigma):
    """(d/2) log(2 pi sigma^2); sigma^2 may overflow."""
    return x.shape[1] * (torch.log(sigma) + 0.5 * math.log(2 * math.pi))


def _finish(z, sums):
    x, _, alpha, sigma, _, shift, centre = z
    s0, s1, s2, q = sums
    moved = s1 / s0[:, None]
    variance = s2 / s0 - (moved * moved).sum(1)
    log_prob = shift + torch.log(s0) - _log_norm(x, sigma)
    trace = (x.shape[1] - (alpha / sigma) ** 2 * variance) / (sigma * sigma)
    return log_prob, centre + moved, trace, s0 * s0 / q


def _twin(x, y, alpha, sigma, log_prior, scale, offset):
    z = anchored(x, y, alpha, sigma, log_prior, scale, offset)
    return _finish(z, derivatives.pair_sums("posterior", z, scale, offset))


def _sweep(x, y, alpha, sigma, log_pi, scale, offset):
    """shift [B] and centre [B, d] by a streaming softmax, moments about the heaviest atom so
    far."""
    B, d = x.shape
    top, total = x.new_full((B,), -math.inf), x.new_zeros(B)
    origin, moment = x.new_zeros(B, d), x.new_zeros(B, d)
    for rows, atom_tiles in derivatives.tiles(B, y.shape[0], d):
        for atoms in atom_tiles:
            t = load(y[atoms], x.dtype, scale, offset)
            found = logits(x[rows], t, alpha[rows], sigma[rows], log_pi[atoms])
            largest, heaviest = found.max(1)
            new = torch.maximum(top[rows], largest)
            safe = torch.where(new == -math.inf, 0.0, new)  # masked atoms only, so far
            about = torch.where((largest > top[rows])[:, None], t[heaviest], origin[rows])
            e, old = torch.exp(found - safe[:, None]), torch.exp(top[rows] - safe)
            t, _ = without_the_weightless(e, t, log_pi[atoms], about)
            before = moment[rows] + total[rows, None] * (origin[rows] - about)
            moment[rows] = torch.einsum("bn,bnd->bd", e, t - about[:, None]) + torch.where(
                (old > 0)[:, None], old[:, None] * before, 0.0
            )
            total[rows] = old * total[rows] + e.sum(1)
            top[rows], origin[rows] = new, about
    return top + torch.log(total), origin + moment / total[:, None]


def _fallback(x, y, alpha, sigma, log_prior, scale, offset):
    log_pi = _log_pi(log_prior, x, y)
    z = [x, y, alpha, sigma, log_pi, *_sweep(x, y, alpha, sigma, log_pi, scale, offset)]
    return _finish(z, derivatives.pair_sums("posterior", z, scale, offset))


def _fake(x, y, alpha, sigma, log_prior, scale, offset):
    return (
        x.new_empty(x.shape[0]),
        x.new_empty(x.shape),
        x.new_empty(x.shape[0]),
        x.new_empty(x.shape[0]),
    )


def _score(covariance_matvec):
    def fast(needs, args, outputs, cotangents):
        """Only x, through log_prob and mean: the score, and (alpha/sigma^2) C g."""
        if any(needs[1:]) or cotangents[2] is not None or cotangents[3] is not None:
            return None
        x, y, alpha, sigma, *rest = args
        grad = 0
        if cotangents[0] is not None:
            grad = -(cotangents[0] / sigma**2)[:, None] * (x - alpha[:, None] * outputs[1])
        if cotangents[1] is not None:
            op = getattr(torch.ops.dfkernels, covariance_matvec)
            through_mean = op(x, y, cotangents[1][:, None], alpha, sigma, *rest)
            grad = grad + (alpha / sigma**2)[:, None] * through_mean[:, 0]
        return (grad, *[None] * (len(args) - 1))

    return fast


def _cuda(*args):
    from .triton import launch

    return launch(*args)


_SCHEMA = (
    "(Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, float scale, "
    "float offset, Tensor? atoms=None, Tensor? counts=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
op = lists.define(
    "posterior",
    _SCHEMA,
    fallback=_fallback,
    fake=_fake,
    cuda=_cuda,
    twin=_twin,
    fast=_score("covariance_matvec"),
    density=True,
    batch=library.folded("posterior", "qaqqa--"),
)


def posterior(
    x: Tensor,
    y: Tensor,
    alpha,
    sigma,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
    atoms: Tensor | None = None,
    counts: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Posterior:
    """log q_t, posterior mean, Fisher trace and ESS of a diffused point cloud, in one pass over the
    atoms.

    Args:
        x: [B, *E] queries, float32 or float64: the compute dtype, and that of every output.
        y: [N, *E] atoms, stored as x.dtype, float32, float16, bfloat16 or uint8; their values are
            scale * y + offset.
        alpha, sigma: a number, 0-d or [B], of any library and real dtype: x = alpha y + sigma eps.
            alpha = 0 is legal; sigma > 0.
        log_prior: [N] log weights, None = uniform; need not be normalised, by any constant. -inf
            masks an atom: neither results nor derivatives see what it holds, NaN included.
        atoms, counts: int64 [M] and [B], both or neither: query b counts only counts[b] >= 1 of
            the atoms. atoms holds their row numbers, each query's ascending, one query after
            another. None: every query counts all atoms.
        kept: (atoms, counts); deprecated, write the two arguments.

    Returns Posterior(log_prob [B], mean [B, *E], fisher_trace [B], ess [B]) (Prop. 5, eq. 16).
    Differentiable to any order in x, y, alpha, sigma and log_prior: log_prob in x costs its
    backward no pass, mean in x one fused pass; every other derivative is a tiled PyTorch sum.
    Forward mode is of the latter kind, since it has to give the tangents of all four outputs. Where
    only that of mean is wanted, take its vjp: d mean/dx = (alpha/sigma^2) C is symmetric.

    Raises ValueError or TypeError naming the argument, under transforms and from a compiled graph
    as well. On the CPU a NaN or inf among the arguments, or an overflow, is found after the fact
    and raised; on CUDA nothing synchronises: NaN in, NaN out. An error of another kind, out of
    memory say, stays what it is.
    """
    args = check.points(x, y, alpha, sigma, log_prior, scale, offset)
    args += lists.arguments(atoms, counts, kept, args[0])
    log_prob, mean, trace, ess = check.call(op, args, x=x, y=y)
    return Posterior(log_prob, mean if x.dim() == 2 else mean.reshape(x.shape), trace, ess)
