"""The k heaviest atoms of each query with their posterior weights: what a noisy sample may be a
copy of.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._torch import check, diagnosis
from ._torch.objects import plain
from .certified.heaviest import heaviest, k_largest, logits, refuse_overflow
from .cloud import PointCloud
from .fisher import DiffusionFisher
from .law import Law
from .ops.common.about_mean import log_norm

__all__ = ["TopK", "top_k"]


class TopK(NamedTuple):
    """The heaviest atoms: their row numbers, index int64 [B, k], and posterior weights, weight
    [B, k], heaviest first, and the earlier one of equally heavy ones.
    """

    index: Tensor
    weight: Tensor


@torch.no_grad()
def top_k(
    x: Tensor,
    cloud: Law,
    alpha: float | Tensor,
    sigma: float | Tensor,
    k: int,
    *,
    tolerance: float | None = None,
) -> TopK:
    """Finds the k atoms with the largest posterior weights, such as what a sample may be a copy of.

    The weights are w_i = softmax_i(log pi_i - |x - alpha y_i|^2/(2 sigma^2)).

    Args:
        x, cloud, alpha, sigma: as in `DiffusionFisher`. Of a `GaussianMixture`, the components,
            with the weights that their widths give.
        k: from 1 to N.
        tolerance: None reads all atoms. With a number in (0, 1) the atoms are found through the
            cloud's index (`cloud.index()`), the same ones, certainly; the weights' normaliser may
            miss that part of the mass.

    Logits are computed in float64; weights have x's dtype. They carry no graph. Without a tolerance
    a call takes up to twice as long as one of `posterior` for long atoms and many queries (d >=
    784, B >= 16), and some ten times as long at d = 8; the first one of a cloud a second pass, for
    what later calls reuse (8 bytes an atom).

    Returns:
        A `TopK`: the rows and the weights of the atoms, heaviest first.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    fisher = DiffusionFisher(x, cloud, alpha, sigma, tolerance=tolerance)
    k = check.integer("k", k, 1, len(cloud))
    with plain(fisher.device):
        if len(x) == 0:
            empty = fisher.x.new_empty(0, k)
            return TopK(empty.to(torch.int64), empty)
        diagnosis.diagnose({name: getattr(fisher, name) for name in ("x", "alpha", "sigma")}, None)
        queries = (fisher.x, fisher.alpha, fisher.sigma, k)
        if fisher.tolerance is None:
            index, log_weight = cloud._k_heaviest(*queries)
        else:
            found = cloud._k_heaviest_within(*queries, fisher.tolerance)
            index, log_weight = _of_some(fisher, k) if found is None else found
        refuse_overflow(log_weight[:, 0])
        return TopK(index, log_weight.exp().to(fisher.dtype))


def _of_some(fisher: DiffusionFisher, k: int) -> tuple[Tensor, Tensor]:
    """As `Law._k_heaviest`, but through the cloud's index, which may leave some queries to be
    answered from all atoms.
    """
    cloud, levels = fisher._points, (fisher.alpha, fisher.sigma)
    assert fisher.tolerance is not None
    atom, counts, _ = cloud._select(fisher.x, *levels, fisher.tolerance, k)
    x, alpha, sigma = _in_double(fisher)
    query = torch.arange(len(x), dtype=torch.int64, device=x.device).repeat_interleave(
        counts.clamp_min(0)
    )
    logit = logits(x, alpha, sigma, cloud._atoms(), query, atom)
    left = (counts < 0).nonzero()[:, 0]
    if len(left):
        found = heaviest(
            x[left],
            alpha[left],
            sigma[left],
            cloud._atoms(),
            cloud._distances(),
            k,
            alpha[left] + math.inf,
        )
        query = torch.cat([query, left.repeat_interleave(k)])
        atom, logit = (
            torch.cat([atom, found.index.flatten()]),
            torch.cat([logit, found.logit.flatten()]),
        )
    _, atom, logit = k_largest(query, atom, logit, len(x), k)
    atom, logit = atom.view(-1, k), logit.view(-1, k)
    wide = DiffusionFisher(fisher.x.double(), cloud, alpha, sigma, tolerance=fisher.tolerance)
    total = _log_total(wide)
    rough = (
        _rounding(x, alpha, sigma, cloud, logit[:, 0]) >= torch.finfo(torch.float32).eps
    ).nonzero()[:, 0]
    if len(rough):  # the kernel's logits are not those above: a weight could be anything
        half = torch.full_like(alpha[rough], torch.finfo(fisher.dtype).eps / 2)
        found = heaviest(
            x[rough], alpha[rough], sigma[rough], cloud._atoms(), cloud._distances(), k, half
        )
        total[rough] = found.log_total
    return atom, logit - total[:, None]


def _rounding(x: Tensor, alpha: Tensor, sigma: Tensor, cloud: PointCloud, best: Tensor) -> Tensor:
    """A bound on what two ways of computing the float64 logit `best` may differ by, [B]: rounding
    alpha y changes x - alpha y, of norm r, by at most `lost`, in units of sigma.
    """
    eps, norm = torch.finfo(torch.float64).eps, cloud.index().named_limits.coordinate_norm
    lost = eps * (x.norm(dim=1) + alpha.abs() * norm) / sigma
    r = (-2 * best).clamp_min(0).sqrt() + lost
    return 2 * lost * r + (x.shape[1] + 8) * eps * r**2


def _in_double(fisher: DiffusionFisher) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, d], alpha and sigma [B] of the queries, in float64."""
    x, alpha, sigma = (t.detach().double() for t in (fisher.x, fisher.alpha, fisher.sigma))
    return x.reshape(len(x), -1), alpha, sigma


def _log_total(fisher: DiffusionFisher) -> Tensor:
    """The logarithm of the sum of weights, log sum_i pi_i exp(-|u_i|^2/2), [B]."""
    return fisher.log_prob.detach() + log_norm(fisher.sigma.detach(), fisher.d)
