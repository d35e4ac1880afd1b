"""The heaviest atoms of each query, exactly, while the logits of all others are only estimated.

With z = x - alpha c about a centre c and t_i = y_i - c, the logit of atom i is

    l_i = log pi_i - |(x - alpha y_i)/sigma|^2/2
        = log pi_i - (|z|^2 - 2 alpha (<z, y_i> - <z, c>) + alpha^2 |t_i|^2)/(2 sigma^2),

a matrix product for many queries and atoms at once, of (z alpha/sigma^2, -alpha^2/(2 sigma^2), 1)
and (y_i, |t_i|^2, log pi_i), beside terms that all atoms of a query share.

In float64 (unit roundoff u) the product is off by (d + 4) u of the sum of the moduli, whatever the
order of its sums; the squares by d u of themselves; z and t are rounded by u (|alpha c| + |z|) and
u |t|. The logit by differences is itself off by (d + 4) u of the square and by
u |x - alpha y| (|alpha y| + |x - alpha y|). With S = |z| + |alpha| max|t| >= |x - alpha y|, where
|z| stands for the norm that was computed plus 2 u |alpha| (|c| + max|t|), an estimate therefore
lies within

    delta = 2 u (d + 16) ((S^2 + S |alpha c| + |z| |alpha| (|c| + max|t|))/sigma^2 + max|log pi|)
            + d 2^-1060/sigma^2

of the logit by differences; the factor 2 covers the terms in u^2, the last term underflow. An atom
can be among the k heaviest only if its estimate is within delta of what k atoms certainly reach.
Those that can are evaluated by differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.common import segments
from ..ops.common.moments import load
from .rounding import UNIT

_BLOCK_NUMBERS = 1 << 17  # of atoms that are made float64 together: they stay in a core's cache
_ESTIMATES = 1 << 18  # estimates at a time: their temporaries stay in a cache as well
_PAIRS = 1 << 20  # pairs (query, atom) that wait to be evaluated
_ON_DEVICES = 1 << 7  # times as many numbers and estimates: there launches count, not caches


@dataclass(frozen=True)
class Atoms:
    """Atoms scale * y + offset, y [N, d], with float64 log weights [N].

    A log weight of -inf masks an atom, whatever it holds.
    """

    y: Tensor
    log_pi: Tensor
    scale: float
    offset: float

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return load(self.y[rows], torch.float64, self.scale, self.offset)

    def buffer(self) -> Tensor:
        """Memory for some atoms and two more numbers of each.

        It is used again and again, since fresh memory costs more than what is done with it.
        """
        N, d = self.y.shape
        n = min(N, max(1, _most(_BLOCK_NUMBERS, self.y.device) // d))
        return torch.empty(n, d + 2, dtype=torch.float64, device=self.y.device)

    def read(self, start: int, buffer: Tensor) -> Tensor:
        """As many atoms [n, d] from `start` on as there are and the buffer holds, in the buffer."""
        atoms = self.y[start : start + len(buffer)]
        out = buffer[: len(atoms)].copy_(atoms)
        if self.scale != 1.0 or self.offset != 0.0:
            torch.add(out.new_tensor(self.offset), out, alpha=self.scale, out=out)
        return out


class Distances(NamedTuple):
    """A centre [d] and the atoms' distances from it [N], 0 where masked; float64."""

    centre: Tensor
    distance: Tensor


class Heaviest(NamedTuple):
    """The heaviest atoms of each query, heaviest first.

    index int64 [B, k]; logit float64 [B, k]; log_total [B], the logsumexp of all logits.
    """

    index: Tensor
    logit: Tensor
    log_total: Tensor


def distances(atoms: Atoms) -> Distances:
    """What a search has to know of all atoms, by one pass over them.

    The centre is the mean of up to 64 atoms.
    """
    unmasked = (atoms.log_pi > -math.inf).nonzero()[:, 0]
    centre = atoms[unmasked[:: max(1, len(unmasked) // 64)]].mean(0)
    buffer = atoms.buffer()[:, :-2]
    found = [
        torch.linalg.vector_norm(atoms.read(start, buffer).sub_(centre), dim=1)
        for start in range(0, len(atoms.y), len(buffer))
    ]
    return Distances(centre, torch.cat(found).masked_fill_(atoms.log_pi == -math.inf, 0))


def heaviest(
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    atoms: Atoms,
    distances: Distances,
    k: int,
    accuracy: Tensor,
) -> Heaviest:
    """Finds the k atoms with the largest logits, of equal ones the earlier.

    The result is the same as if all logits were evaluated by differences.

    Args:
        x: [B, d], float64.
        alpha, sigma: [B], float64.
        atoms: the cloud.
        distances: of its atoms.
        k: from 1 to N.
        accuracy: [B]: log_total is right to this much, and to the rounding of float64 logits; inf
            where it is not needed.
    """
    N = len(atoms.y)
    most = _most(_ESTIMATES, x.device)
    n = min(N, max(4096, most // (4 * len(x)), k))
    queries = max(1, most // n)
    found = []
    for q in range(0, len(x), queries):
        part = slice(q, q + queries)
        search = _Search(x[part], alpha[part], sigma[part], atoms, distances, k, accuracy[part])
        for start in range(0, N, n):
            search.look_at(slice(start, min(start + n, N)))
        found.append(search.result())
    return Heaviest(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def heaviest_for(
    dtype: torch.dtype,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    atoms: Atoms,
    distances: Distances,
    k: int,
    log_total: Callable[[], Tensor],
) -> Heaviest:
    """As `heaviest`, with a log_total as good as a result of this dtype can be.

    Args:
        dtype: float32 or float64.
        log_total: what a kernel finds in float64. It is called where no estimate is as good.
    """
    half = torch.full_like(alpha, torch.finfo(dtype).eps / 2)  # goes unseen
    search = (x, alpha, sigma, atoms, distances, k)
    if dtype == torch.float32:
        return heaviest(*search, half)
    # in float64 no estimate is as good. Where estimates are rough, few atoms weigh anything, and
    # they are evaluated; elsewhere logits are small enough for the density of the kernel
    smooth = error_bound(*search[:-1]) < torch.finfo(torch.float32).eps
    found = heaviest(*search, torch.where(smooth, math.inf, half))
    if bool(smooth.any()):
        return found._replace(log_total=torch.where(smooth, log_total(), found.log_total))
    return found


def all_logits(
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    atoms: Atoms,
    distances: Distances,
    accuracy: float,
    depth: float,
) -> Tensor:
    """The logits of all atoms, [B, N] in float64: right to `accuracy` where they are at most
    `depth` below a query's largest, and elsewhere certainly below that.

    Args:
        x, alpha, sigma, atoms, distances: as in `heaviest`.
    """
    search = _Search(x, alpha, sigma, atoms, distances, 1, torch.ones_like(alpha))
    estimate, delta = search._estimate(slice(0, len(atoms.y)))
    estimate = estimate + search.shared
    rough = ~(delta[:, 0] <= accuracy)
    needed = (estimate - delta).amax(1, keepdim=True) - depth
    query, atom = ((estimate + delta >= needed) & rough[:, None]).nonzero().unbind(1)
    estimate[query, atom] = logits(x, alpha, sigma, atoms, query, atom)
    return estimate


def error_bound(
    x: Tensor, alpha: Tensor, sigma: Tensor, atoms: Atoms, distances: Distances
) -> Tensor:
    """The delta of the formula above for all atoms, [B]."""
    search = _Search(x, alpha, sigma, atoms, distances, 1, torch.ones_like(alpha))
    return search.delta(slice(None))[:, 0]


def logits(
    x: Tensor, alpha: Tensor, sigma: Tensor, atoms: Atoms, query: Tensor, atom: Tensor
) -> Tensor:
    """The logits of pairs (query[m], atom[m]) by differences, in float64, [M]."""
    step = max(2, _most(_BLOCK_NUMBERS, x.device) // x.shape[1])
    parts = [x.new_empty(0)]
    for q, a in zip(query.split(step), atom.split(step), strict=True):
        rows = a if len(a) > 1 else a.repeat(2)  # torch adds up a single row in another order
        u = (x[q] - alpha[q, None] * atoms[rows]) / sigma[q, None]
        log_pi = atoms.log_pi[a]
        logit = log_pi - u.square_().sum(1)[: len(a)] / 2
        parts.append(torch.where(log_pi > -math.inf, logit, -math.inf))
    return torch.cat(parts)


def k_largest(
    query: Tensor, atom: Tensor, logit: Tensor, count: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs with the k largest logits of each of `count` queries, of equal ones the earlier
    atoms; query by query, heaviest first.
    """
    order = atom.argsort(stable=True)
    order = order[logit[order].argsort(descending=True, stable=True)]
    order = order[query[order].argsort(stable=True)]
    query = query[order]
    begin = torch.searchsorted(query, torch.arange(count, dtype=torch.int64, device=query.device))
    rank = torch.arange(len(query), dtype=torch.int64, device=query.device) - begin[query]
    among = rank < k
    return query[among], atom[order[among]], logit[order[among]]


def refuse_overflow(largest: Tensor) -> None:
    """Raises ValueError where the largest logit of a query is not finite."""
    if not bool(largest.isfinite().all()):
        raise ValueError(
            "x, alpha, sigma: expected distances that float64 can hold, got an overflow"
        )


def _most(numbers: int, device: torch.device) -> int:
    """How many numbers of float64 are handled together."""
    return numbers if device.type == "cpu" else _ON_DEVICES * numbers


def _logsumexp(t: Tensor, largest: Tensor) -> Tensor:
    """Over dimension 1, with `largest` [Q, 1] known.

    Whatever is 100 and more below the largest counts e^-100, since exp is slow where it underflows.
    """
    total = (t - largest).clamp_min_(-100).exp_().sum(1).log() + largest[:, 0]
    return torch.where(largest[:, 0] > -math.inf, total, -math.inf)


class _Search:
    """Queries, and what is known of their heaviest atoms."""

    def __init__(
        self,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        atoms: Atoms,
        distances: Distances,
        k: int,
        accuracy: Tensor,
    ) -> None:
        self.x, self.atoms, self.distances, self.k = x, atoms, distances, k
        self.alpha, self.sigma = alpha[:, None], sigma[:, None]
        self.accuracy = accuracy[:, None]
        # atoms that are so far below the heaviest weigh less than the accuracy together
        self.gap = math.log(len(atoms.y)) - self.accuracy.clamp_max(1).log()
        self.z = x - self.alpha * distances.centre
        self.z_norm = torch.linalg.vector_norm(self.z, dim=1, keepdim=True)
        variance = self.sigma**2
        z = self.z * (self.alpha / variance)
        ones = torch.ones_like(self.alpha)
        self.weights = torch.cat([z, -(self.alpha**2) / (2 * variance), ones], 1)
        # what all atoms of a query share
        self.shared = -(z @ distances.centre)[:, None] - self.z_norm**2 / (2 * variance)
        self.masks = bool((atoms.log_pi == -math.inf).any())
        # k atoms certainly reach these, largest first
        self.lower = x.new_full((len(x), k), -math.inf)
        self.log_total = x.new_full((len(x),), -math.inf)
        self.waiting: list[tuple[Tensor, ...]] = []
        self.count, self.buffer = 0, atoms.buffer()
        none = torch.empty(0, dtype=torch.int64, device=x.device)
        self.found = none, none, x.new_empty(0)  # query, atom, logit: up to k of each query

    def look_at(self, rows: slice) -> None:
        """Estimates the logits of some atoms and notes those that have to be evaluated."""
        estimate, delta = self._estimate(rows)
        largest = estimate.topk(min(self.k, estimate.shape[1])).values
        lower = torch.cat([self.lower, largest + self.shared - delta], 1)
        self.lower = lower.topk(self.k).values
        # where estimates are too rough for the total, whatever counts for it is evaluated
        too_rough = ~(delta <= self.accuracy)
        if not bool(too_rough.all()):
            total = torch.logaddexp(
                self.log_total, _logsumexp(estimate, largest[:, :1]) + self.shared[:, 0]
            )
            self.log_total = torch.where(too_rough[:, 0], self.log_total, total)
        needed = self._needed(too_rough) - self.shared - delta
        queries = (largest[:, :1] >= needed).nonzero()[:, 0]
        query, atom = (estimate[queries] >= needed[queries]).nonzero().unbind(1)
        query = queries[query]
        upper = estimate[query, atom] + (self.shared + delta)[query, 0]
        self.waiting.append((query, atom + rows.start, upper, too_rough[query, 0]))
        self.count += len(query)
        if self.count > _PAIRS:
            self._evaluate()

    def _needed(self, too_rough: Tensor) -> Tensor:
        """An atom is evaluated if its logit can reach this, [Q, 1].

        Where estimates are too rough, an atom that may count for the total is evaluated as well.
        """
        kth, best = self.lower[:, -1:], self.lower[:, :1]
        return torch.where(too_rough, torch.minimum(kth, best - self.gap), kth)

    def _estimate(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(estimates [Q, n] without `shared`, delta [Q, 1]); (0, inf) for queries that overflow."""
        estimate = self.weights.new_empty(len(self.x), rows.stop - rows.start)
        for start in range(rows.start, rows.stop, len(self.buffer)):
            block = slice(start, min(start + len(self.buffer), rows.stop))
            columns = self._columns(block)
            out = estimate[:, start - rows.start :][:, : len(columns)]
            torch.mm(self.weights, columns.T, out=out)
        delta = self.delta(rows)
        overflow = ~(delta + self.shared.abs() < math.inf)
        if bool(overflow.any()):
            estimate = estimate.masked_fill(overflow, 0)
            delta = delta.masked_fill(overflow, math.inf)
            self.shared = self.shared.masked_fill(overflow, 0)
        return estimate, delta

    def _columns(self, rows: slice) -> Tensor:
        """y, |t|^2 and log pi of some atoms, [n, d + 2]: the queries' `weights` multiply them."""
        columns = self.buffer[: rows.stop - rows.start]
        self.atoms.read(rows.start, columns[:, :-2])
        log_pi = self.atoms.log_pi[rows]
        if self.masks:
            columns[:, :-2].masked_fill_((log_pi == -math.inf)[:, None], 0)
        torch.square(self.distances.distance[rows], out=columns[:, -2])
        columns[:, -1] = log_pi
        return columns

    def delta(self, rows: slice) -> Tensor:
        """By how much estimates of some atoms may be off, [Q, 1]."""
        log_pi, d = self.atoms.log_pi[rows], self.x.shape[1]
        prior = log_pi.masked_fill(log_pi == -math.inf, 0).abs().max()
        alpha, radius = self.alpha.abs(), self.distances.distance[rows].max()
        centre = torch.linalg.vector_norm(self.distances.centre)
        z_norm = self.z_norm + 2 * UNIT * alpha * (centre + radius)  # before z was rounded
        S = z_norm + alpha * radius
        squares = S**2 + S * alpha * centre + z_norm * alpha * (centre + radius)
        rounding = 2 * UNIT * (d + 16) * (squares / self.sigma**2 + prior)
        return rounding + d * 2.0**-1060 / self.sigma**2

    def _evaluate(self) -> None:
        """Evaluates what waits and may still matter; the k heaviest of each query stay."""
        if not self.waiting:
            return
        query, atom, upper, too_rough = map(torch.cat, zip(*self.waiting, strict=True))
        all_too_rough = torch.ones_like(self.gap, dtype=torch.bool)
        needed = torch.where(
            too_rough, self._needed(all_too_rough)[query, 0], self._needed(~all_too_rough)[query, 0]
        )
        matters = upper >= needed
        query, atom, too_rough = query[matters], atom[matters], too_rough[matters]
        logit = logits(self.x, self.alpha[:, 0], self.sigma[:, 0], self.atoms, query, atom)
        self._add_to_total(query[too_rough], logit[too_rough])
        new = query, atom, logit
        query, atom, logit = map(torch.cat, zip(self.found, new, strict=True))
        self.found = k_largest(query, atom, logit, len(self.x), self.k)
        self.waiting, self.count = [], 0

    def _add_to_total(self, query: Tensor, logit: Tensor) -> None:
        if not len(query):
            return
        order = query.argsort(stable=True)
        query, logit = query[order], logit[order]
        queries, counts = query.unique_consecutive(return_counts=True)
        total = segments.logsumexp(logit, counts)
        self.log_total[queries] = torch.logaddexp(self.log_total[queries], total)

    def result(self) -> Heaviest:
        self._evaluate()
        _, atom, logit = self.found
        return Heaviest(atom.view(-1, self.k), logit.view(-1, self.k), self.log_total)
