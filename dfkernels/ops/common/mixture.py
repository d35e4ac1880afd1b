"""Sums over the components of a mixture of Gaussians, q_0 = sum_i pi_i N(y_i, diag(v_i)).

An atom with a variance is a component. Per query and component, with u_i = (x - alpha y_i)/sigma,

    rho_i = (alpha/sigma)^2 v_i           tau_i^2 = sigma^2 (1 + rho_i), coordinate by coordinate
    logit_i = log pi_i - sum_k (log(sqrt(2 pi) tau_ik) + u_ik^2/(2 (1 + rho_ik)))
    s_i = -u_i/(sigma (1 + rho_i))        the score of component i
    m_i = y_i + alpha v_i/tau_i^2 (x - alpha y_i)   the mean of x_0, given component i

and e_i = exp(logit_i - shift). The sums of a kind are taken about `reference`, near the score; the
variances are one more tensor of the kind. So derivatives follow as for atoms (derivatives.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch import autograd, check, library
from . import derivatives, moments
from .derivatives import Stored
from .moments import Inputs, MomentKind, first_moment

SHARED = ("y", "variance", "log_prior")  # by all queries of a call


def arguments(
    x, y, variance, alpha, sigma, log_prior, scale, offset
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, float, float]:
    """The checked arguments of the ops over components, flat: variance as [N, d], [N, 1], [1, d] or
    [1, 1]."""
    checked = check.points(x, y, alpha, sigma, log_prior, scale, offset)
    return *checked[:2], check.variance(variance, x, y), *checked[2:]


def given(args: Sequence[Any], **tensors) -> dict[str, Tensor]:
    """For `diagnosis.call`: the arguments as the caller gave them, where they are tensors, and the
    noise levels as they were before `widened`."""
    return {"sigma": args[4], **{k: t for k, t in tensors.items() if isinstance(t, Tensor)}}


def widened(args: Sequence[Any]) -> Any:
    """The arguments of the ops over atoms in which one variance of all components, if it is one,
    has become noise: sigma is sqrt(sigma^2 + alpha^2 v), and nothing else changes; else None."""
    x, y, variance, alpha, sigma, log_prior, scale, offset = args
    if variance.shape != (1, 1):
        return None
    ratio, v = alpha / sigma, variance[0, 0]
    v = torch.where(v >= 0, v, math.nan)  # which the kernels refuse
    tau = sigma * torch.sqrt(1 + ratio * (ratio * v))  # and a negative sigma stays negative
    return x, y, alpha, tau, log_prior, scale, offset


class Terms(NamedTuple):
    """What a tile's queries see of its components."""

    e: Tensor  # [B, N]
    score: Tensor  # [B, N, d]: s - reference
    precision: Tensor  # [B, N, d], or [B, N, 1] where coordinates share a variance: 1/tau^2
    mean: Tensor  # [B, N, d]: m


@dataclass(frozen=True)
class MixtureKind(MomentKind):
    """A family of sums over components; `sums` takes (terms, *own without the variances)."""

    def on_tile(self, tensors, scale: float, offset: float) -> tuple[Tensor, ...]:
        z, (variance, *own) = (
            Inputs(*tensors[: len(Inputs._fields)]),
            tensors[len(Inputs._fields) : len(self.inputs)],
        )
        z = z._replace(y=moments.load(z.y, z.y.dtype, scale, offset))
        return self.sums(_terms(z, variance), *own)


def logits(x, y, variance, alpha, sigma, log_pi) -> Tensor:
    """The logits of the module's docstring, [B, N]; -inf for a masked component, whatever it holds.

    Args:
        x: [B, d].
        y: [N, d] or, a set for each query, [B, N, d].
        variance: Likewise, or with 1 in the place of d.
        alpha, sigma: [B].
        log_pi: [N] or [B, N].
    """
    root = _root(variance, alpha, sigma)
    u = _residual(x, y, alpha, sigma) / root
    shared = x.shape[1] // root.shape[-1]  # how many coordinates share a variance
    unit = (math.sqrt(2 * math.pi) * sigma)[:, None, None]
    logit = log_pi - 0.5 * (u * u).sum(-1) - shared * torch.log(unit * root).sum(-1)
    return torch.where(log_pi == -math.inf, -math.inf, logit)


def _residual(x, y, alpha, sigma) -> Tensor:
    """u, [B, N, d]."""
    return (x[:, None] - alpha[:, None, None] * y) / sigma[:, None, None]


def _root(variance, alpha, sigma) -> Tensor:
    """sqrt(1 + rho), [B, N, d] or [B, N, 1]."""
    ratio = (alpha / sigma)[:, None, None]
    return torch.sqrt(1 + ratio * (ratio * variance))


def _terms(z: Inputs, variance: Tensor) -> Terms:
    assert z.log_pi is not None
    shift, reference = z.shift.detach()[:, None], z.reference.detach()[:, None]

    def exponential(y: Tensor, variance: Tensor, log_pi: Tensor) -> Tensor:
        found = logits(z.x, y, variance, z.alpha, z.sigma, log_pi)
        return torch.exp((found - shift).to(found.dtype))

    with torch.no_grad():
        weighs = exponential(z.y, variance, z.log_pi) != 0
    # as moments.without_weightless: zero times what a weightless component holds may be NaN
    y = torch.where(weighs[..., None], z.y, 0.0)
    variance = torch.where(weighs[..., None], variance, 1.0)
    log_pi = torch.where(weighs, z.log_pi, -math.inf)
    root = _root(variance, z.alpha, z.sigma)
    tau = z.sigma[:, None, None] * root
    score = -_residual(z.x, y, z.alpha, z.sigma) / root / tau
    mean = y - z.alpha[:, None, None] * variance * score
    return Terms(exponential(y, variance, log_pi), score - reference, 1 / (tau * tau), mean)


def about(x, y, variance, alpha, sigma, log_pi, scale, offset) -> tuple[Tensor, Tensor, Tensor]:
    """log sum_i exp(logit_i) [B], float64, and roughly the score and the mean of x_0 [B, d], by a
    streaming softmax."""
    B, d = x.shape
    total = x.new_full((B,), -math.inf, dtype=torch.float64)
    score, mean = x.new_zeros(B, d), x.new_zeros(B, d)
    for q, atom_tiles in derivatives.tiles(B, y.shape[0], d):
        for atoms in atom_tiles:
            values = moments.load(y[atoms], x.dtype, scale, offset)
            z = Inputs(x[q], values, alpha[q], sigma[q], log_pi[atoms], total[q], score[q])
            found = logits(z.x, values, variance[atoms], z.alpha, z.sigma, log_pi[atoms]).double()
            new = torch.logaddexp(total[q], found.logsumexp(1))
            z = z._replace(shift=torch.where(new == -math.inf, 0.0, new))  # masked ones, so far
            c = _terms(z, variance[atoms])
            score[q] += first_moment(c.e, c.score)
            mean[q] += first_moment(c.e, c.mean - mean[q, None])
            total[q] = new
    return total, score, mean


def sums(
    kind: MomentKind, args: Sequence[Any], own: Sequence[Tensor] = (), *, differentiated: bool
) -> tuple[Inputs, Tensor, list[Tensor]]:
    """The inputs of a kind, the mean that goes with z.reference, and the sums of the kind.

    Args:
        kind: A registered kind, whose tensors are the variances, `own`, and that mean where the
            kind names it.
        args: What all ops over components have: x, y, variance, alpha, sigma, log_prior, scale,
            offset.
        own: The kind's own tensors.
        differentiated: Whether the sums are to be differentiable. Then they are about the score
            and the mean themselves, which an op finds, so that a traced graph has no loop.
    """
    x, y, variance, alpha, sigma, log_prior, scale, offset = args
    N = y.shape[0]
    variance = variance.expand(N, -1)
    prior = None if log_prior is None else torch.log_softmax(log_prior, 0)
    if differentiated:
        constants = [a.detach() if isinstance(a, Tensor) else a for a in args]
        log_prob, mean, _, _, reference = library.overload("mixture_posterior")(*constants)
        shift = log_prob.double()
    else:
        uniform = x.new_full((N,), -math.log(N)) if prior is None else prior
        shift, reference, mean = about(x, y, variance, alpha, sigma, uniform, scale, offset)
    z = Inputs(x, y, alpha, sigma, prior, shift, reference)
    own = [*own, mean] if "mean_reference" in kind.own else own
    found = derivatives.pair_sums(kind, [*z, variance, *own], Stored(scale, offset))
    return z, mean, found


def log_density(z: Inputs, weight: Tensor) -> Tensor:
    """log_prob [B] in the compute dtype, from the sum of the weights."""
    (shift,) = autograd.with_tangents(weight, [z.shift])
    return (shift + torch.log(weight)).to(z.x.dtype)
