"""log q_t alone, in one pass over the atoms that adds up no vectors.

log_prob = logsumexp_i(log pi_i - |x - alpha y_i|^2/(2 sigma^2)) - (d/2) log(2 pi sigma^2)
with log pi normalised; its gradient in x is the score, (alpha mean - x)/sigma^2
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._torch import check, diagnosis, library
from ..._torch.types import Level
from ..common import derivatives, lists, moments
from ..common.about_mean import about_mean, log_density, log_norm
from ..common.derivatives import Stored
from ..posterior import KIND as POSTERIOR
from .reference import log_prob as reference

__all__ = ["log_prob", "reference"]


def _fallback(x, y, alpha, sigma, log_prior, scale, offset):
    """A streaming logsumexp of logits in the difference form."""
    if log_prior is None:
        log_prior = x.new_zeros(()).expand(y.shape[0])
    log_pi = torch.log_softmax(log_prior, 0)
    B, d = x.shape
    found = x.new_full((B,), -math.inf, dtype=torch.float64)
    for q, atom_tiles in derivatives.tiles(B, y.shape[0], d):
        for atoms in atom_tiles:
            values = moments.load(y[atoms], x.dtype, scale, offset)
            logits = moments.logits(x[q], values, alpha[q], sigma[q], log_pi[atoms])
            found[q] = torch.logaddexp(found[q], logits.double().logsumexp(1))
    return (found - log_norm(sigma.double(), d)).to(x.dtype)


def _differentiable(x, y, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None):
    """With the sums of `posterior`, which give the derivatives in x, alpha and sigma as well."""
    stored = Stored(scale, offset, atoms, counts)
    z, (weight, *_) = about_mean(POSTERIOR, x, y, alpha, sigma, log_prior, stored)
    return log_density(z, weight)


op = lists.define(
    "log_prob",
    "(Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, float scale, "
    "float offset, Tensor? atoms=None, Tensor? counts=None) -> Tensor",
    fallback=_fallback,
    fake=lambda x, *_: x.new_empty(x.shape[0]),
    cuda=library.in_triton(__name__),
    lists_on_cuda=True,
    differentiable=_differentiable,
    density=True,
)


def log_prob(
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
    batched: bool = False,
) -> Tensor:
    """Computes log q_t of a diffused data set, and nothing else, in one pass.

    It is the first result of `posterior`, for about half the work where many atoms carry weight.
    Take it where the mean is not needed: kernel density estimates, half-steps of Sinkhorn's
    algorithm, likelihood ratios. Where the score is needed too, `posterior` costs no more.

    Args:
        x: Queries ``[B, *E]``, float32 or float64: the compute dtype, and that of the output.
        y: Atoms ``[N, *E]``, stored as x.dtype, float32, float16, bfloat16 or uint8; their values
            are scale * y + offset.
        alpha: Signal level of each query, a number or [B]; 0 is legal (pure noise).
        sigma: Noise level of each query, a number or [B], positive.
        log_prior: Log weights [N], None for uniform ones; any constant may be added to them. -inf
            masks an atom, whatever it holds.
        scale: Factor of the stored atoms.
        offset: What is added to them.
        atoms: Lists of atoms, int64 [M], as in `posterior`. log_prior stays normalised over all
            atoms.
        counts: How many of them each query has, int64 [B]; goes with atoms.
        batched: One call for G data sets, [G, B] in place of [B] and [G, N] of [N]; see
            `posterior`.

    Returns:
        log_prob [B], differentiable to any order in x, y, alpha, sigma and log_prior, as that of
        `posterior` is. Where a derivative is asked for, it is taken from the sums of `posterior`:
        the value then costs a pass like that one, and the gradients in x, alpha and sigma none.

    Raises:
        TypeError: An argument has a type or dtype that it cannot have; the message names it.
        ValueError: So for a shape, a device or a value.
    """
    args = check.points(x, y, alpha, sigma, log_prior, scale, offset, batched)
    args += lists.arguments(atoms, counts, None, args[0], batched)
    out = diagnosis.call(op, args, x=x, y=y, **check.given_levels(alpha, sigma, batched))
    return out.reshape(*x.shape[:2], *out.shape[1:]) if batched else out
