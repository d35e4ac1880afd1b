"""The heaviest atoms of each query, exactly, while the logits of all others are only estimated.

With z = x - alpha c about a centre c and t_i = y_i - c, the logit of atom i is
    l_i = log pi_i - |(x - alpha y_i)/sigma|^2/2
        = log pi_i - (|z|^2 - 2 alpha (<z, y_i> - <z, c>) + alpha^2 |t_i|^2)/(2 sigma^2),
a matrix product for many queries and atoms at once, of (z alpha/sigma^2, -alpha^2/(2 sigma^2), 1)
and (y_i, |t_i|^2, log pi_i), beside what all atoms of a query share. In float64 (unit roundoff u)
the product is off by (d + 4) u of the sum of the moduli, whatever the order of its sums; the
squares by d u of themselves; z and t are rounded by u (|alpha c| + |z|) and u |t|; and l_i
evaluated by differences is itself off by (d + 4) u of the square and by u |x - alpha y| (|alpha y|
+ |x - alpha y|). With S = |z| + |alpha| max|t| >= |x - alpha y|, where |z| stands for the norm that
    was computed and 2 u |alpha| (|c| + max|t|), an estimate lies therefore within delta = 2 u (d +
    16) ((S^2 + S |alpha c| + |z| |alpha| (|c| + max|t|))/sigma^2 + max|log pi|) + d 2^-1060/sigma^2
of the l_i evaluated by differences; the factor 2 covers the terms in u^2, the last term underflow.
An atom can be among the k heaviest only if its estimate is within delta of what k atoms certainly
reach. Those that can are evaluated by differences.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.common.moments import load

_UNIT = 2.0**-53
_BLOCK = 1 << 17  # numbers of atoms that are made float64 together: they stay in a core's cache
_ESTIMATES = 1 << 18  # estimates at a time: their temporaries stay in a cache as well
_PAIRS = 1 << 20  # pairs (query, atom) that wait to be evaluated


class Atoms(NamedTuple):
    """Atoms scale * y + offset, y [N, d], with float64 log weights [N] (-inf masks an atom,
    whatever it holds)."""

    y: Tensor
    log_pi: Tensor
    scale: float
    offset: float

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return load(self.y[rows], torch.float64, self.scale, self.offset)

    def room(self) -> Tensor:
        """Memory for some atoms and two numbers more of each, used again and again: fresh memory
        costs more than what is done with it."""
        N, d = self.y.shape
        return torch.empty(
            min(N, max(1, _BLOCK // d)), d + 2, dtype=torch.float64, device=self.y.device
        )

    def read(self, start: int, room: Tensor) -> Tensor:
        """As many atoms [n, d] as there are and the room holds; the same numbers as self[start :
        ...]."""
        atoms = self.y[start : start + len(room)]
        out = room[: len(atoms)].copy_(atoms)
        if self.scale != 1.0 or self.offset != 0.0:
            torch.add(out.new_tensor(self.offset), out, alpha=self.scale, out=out)
        return out


class About(NamedTuple):
    """What a search has to know of all atoms: a centre [d], and |y - centre| [N], 0 where masked;
    float64."""

    centre: Tensor
    radius: Tensor


class Heaviest(NamedTuple):
    """index int64 [B, k], logit float64 [B, k], heaviest first; log_total [B], the logsumexp of all
    logits."""

    index: Tensor
    logit: Tensor
    log_total: Tensor


def about(atoms: Atoms) -> About:
    """One pass over the atoms. The centre is the mean of up to 64 of them."""
    some = (atoms.log_pi > -math.inf).nonzero()[:, 0]
    centre = atoms[some[:: max(1, len(some) // 64)]].mean(0)
    room = atoms.room()[:, :-2]
    radius = [
        torch.linalg.vector_norm(atoms.read(start, room).sub_(centre), dim=1)
        for start in range(0, len(atoms.y), len(room))
    ]
    return About(centre, torch.cat(radius).masked_fill_(atoms.log_pi == -math.inf, 0))


def heaviest(
    x: Tensor, alpha: Tensor, sigma: Tensor, atoms: Atoms, about: About, k: int, accuracy: Tensor
) -> Heaviest:
    """The k atoms with the largest logits, of equal ones the earlier; the same as if all were
    evaluated.

    Args:
        x, alpha, sigma: [B, d], [B], [B], float64.
        accuracy: [B]: log_total is right to this much, and to the rounding of float64 logits; inf
            where it is not needed.
    """
    N = len(atoms.y)
    n = min(N, max(4096, _ESTIMATES // (4 * len(x)), k))
    queries = max(1, _ESTIMATES // n)
    found = []
    for q in range(0, len(x), queries):
        some = slice(q, q + queries)
        search = _Search(x[some], alpha[some], sigma[some], atoms, about, k, accuracy[some])
        for start in range(0, N, n):
            search.look_at(slice(start, min(start + n, N)))
        found.append(search.result())
    return Heaviest(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def error_bound(x: Tensor, alpha: Tensor, sigma: Tensor, atoms: Atoms, about: About) -> Tensor:
    """The delta of the formula above for all atoms, [B]."""
    search = _Search(x, alpha, sigma, atoms, about, 1, torch.ones_like(alpha))
    return search.delta(slice(None))[:, 0]


def logits(
    x: Tensor, alpha: Tensor, sigma: Tensor, atoms: Atoms, query: Tensor, atom: Tensor
) -> Tensor:
    """The logits of pairs (query[m], atom[m]) by differences, in float64, [M]."""
    step = max(2, _BLOCK // x.shape[1])
    parts = [x.new_empty(0)]
    for q, a in zip(query.split(step), atom.split(step), strict=True):
        rows = a if len(a) > 1 else a.repeat(2)  # torch adds up a single row in another order
        u = (x[q] - alpha[q, None] * atoms[rows]) / sigma[q, None]
        log_pi = atoms.log_pi[a]
        logit = log_pi - u.square_().sum(1)[: len(a)] / 2
        parts.append(torch.where(log_pi > -math.inf, logit, -math.inf))
    return torch.cat(parts)


def first_k(
    query: Tensor, atom: Tensor, logit: Tensor, count: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of pairs, those with the k largest logits of each of `count` queries, of equal ones the
    earlier atoms; query by query, heaviest first.
    """
    order = atom.argsort(stable=True)
    order = order[logit[order].argsort(descending=True, stable=True)]
    order = order[query[order].argsort(stable=True)]
    query = query[order]
    first = torch.searchsorted(query, torch.arange(count, dtype=torch.int64, device=query.device))
    kept = torch.arange(len(query), dtype=torch.int64, device=query.device) - first[query] < k
    return query[kept], atom[order[kept]], logit[order[kept]]


def _logsumexp(t: Tensor, top: Tensor) -> Tensor:
    """Over dimension 1, top [Q, 1] being the largest. Where exp underflows it is slow: whatever is
    100 and more below the largest counts e^-100.
    """
    total = (t - top).clamp_min_(-100).exp_().sum(1).log() + top[:, 0]
    return torch.where(top[:, 0] > -math.inf, total, -math.inf)


class _Search:
    """Queries, and what is known of their heaviest atoms."""

    def __init__(
        self,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        atoms: Atoms,
        about: About,
        k: int,
        accuracy: Tensor,
    ) -> None:
        self.x, self.atoms, self.about, self.k = x, atoms, about, k
        self.alpha, self.sigma = alpha[:, None], sigma[:, None]
        self.accuracy = accuracy[:, None]
        # all that is so far below the best weighs less than the accuracy together
        self.gap = math.log(len(atoms.y)) - self.accuracy.clamp_max(1).log()
        self.z = x - self.alpha * about.centre
        self.size = torch.linalg.vector_norm(self.z, dim=1, keepdim=True)
        variance = self.sigma**2
        z = self.z * (self.alpha / variance)
        ones = torch.ones_like(self.alpha)
        self.weights = torch.cat([z, -(self.alpha**2) / (2 * variance), ones], 1)
        self.shared = -(z @ about.centre)[:, None] - self.size**2 / (2 * variance)  # by all atoms
        self.masks = bool((atoms.log_pi == -math.inf).any())
        self.lower = x.new_full(
            (len(x), k), -math.inf
        )  # that many atoms certainly reach these, largest first
        self.log_total = x.new_full((len(x),), -math.inf)
        self.waiting, self.count, self.room = [], 0, atoms.room()
        none = torch.empty(0, dtype=torch.int64, device=x.device)
        self.found = none, none, x.new_empty(0)  # query, atom, logit: up to k of each query

    def look_at(self, rows: slice) -> None:
        """Estimates the logits of some atoms and notes those that have to be evaluated."""
        estimate, delta = self._estimate(rows)
        top = estimate.topk(min(self.k, estimate.shape[1])).values
        lower = torch.cat([self.lower, top + self.shared - delta], 1)
        self.lower = lower.topk(self.k).values
        # where estimates are too rough for the total, whatever counts for it is evaluated
        rough = ~(delta <= self.accuracy)
        if not bool(rough.all()):
            total = torch.logaddexp(
                self.log_total, _logsumexp(estimate, top[:, :1]) + self.shared[:, 0]
            )
            self.log_total = torch.where(rough[:, 0], self.log_total, total)
        needed = self._needed(rough) - self.shared - delta
        some = (top[:, :1] >= needed).nonzero()[:, 0]
        query, atom = (estimate[some] >= needed[some]).nonzero().unbind(1)
        query = some[query]
        upper = estimate[query, atom] + (self.shared + delta)[query, 0]
        self.waiting.append((query, atom + rows.start, upper, rough[query, 0]))
        self.count += len(query)
        if self.count > _PAIRS:
            self._evaluate()

    def _needed(self, rough: Tensor) -> Tensor:
        """An atom is evaluated if its logit can reach this, [Q, 1]; rough: if it may count for the
        total."""
        kth, best = self.lower[:, -1:], self.lower[:, :1]
        return torch.where(rough, torch.minimum(kth, best - self.gap), kth)

    def _estimate(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(estimates [Q, n] less `shared`, delta [Q, 1]) of the formula above; (0, inf) for queries
        that overflow.
        """
        estimate = self.weights.new_empty(len(self.x), rows.stop - rows.start)
        for start in range(rows.start, rows.stop, len(self.room)):
            block = slice(start, min(start + len(self.room), rows.stop))
            columns = self._columns(block)
            torch.mm(
                self.weights, columns.T, out=estimate[:, start - rows.start :][:, : len(columns)]
            )
        delta = self.delta(rows)
        overflow = ~(delta + self.shared.abs() < math.inf)
        if bool(overflow.any()):
            estimate, delta = (
                estimate.masked_fill(overflow, 0),
                delta.masked_fill(overflow, math.inf),
            )
            self.shared = self.shared.masked_fill(overflow, 0)
        return estimate, delta

    def _columns(self, rows: slice) -> Tensor:
        """y, |t|^2 and log pi of some atoms, [n, d + 2], which `weights` of the queries
        multiply."""
        room = self.room[: rows.stop - rows.start]
        self.atoms.read(rows.start, room[:, :-2])
        log_pi = self.atoms.log_pi[rows]
        if self.masks:
            room[:, :-2].masked_fill_((log_pi == -math.inf)[:, None], 0)
        torch.square(self.about.radius[rows], out=room[:, -2])
        room[:, -1] = log_pi
        return room

    def delta(self, rows: slice) -> Tensor:
        """By how much estimates of some atoms may be off, [Q, 1]."""
        log_pi, d = self.atoms.log_pi[rows], self.x.shape[1]
        prior = log_pi.masked_fill(log_pi == -math.inf, 0).abs().max()
        alpha, far = self.alpha.abs(), self.about.radius[rows].max()
        centre = torch.linalg.vector_norm(self.about.centre)
        size = self.size + 2 * _UNIT * alpha * (centre + far)  # of z before it was rounded
        reach = size + alpha * far
        squares = reach**2 + reach * alpha * centre + size * alpha * (centre + far)
        return (
            2 * _UNIT * (d + 16) * (squares / self.sigma**2 + prior)
            + d * 2.0**-1060 / self.sigma**2
        )

    def _evaluate(self) -> None:
        """Evaluates what waits and may still matter, and keeps the k heaviest of each query."""
        if not self.waiting:
            return
        query, atom, upper, rough = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        if_rough, if_not = (
            self._needed(torch.full_like(self.gap, r).bool())[query, 0] for r in (1, 0)
        )
        needed = torch.where(rough, if_rough, if_not)
        matters = upper >= needed
        query, atom, rough = query[matters], atom[matters], rough[matters]
        logit = logits(self.x, self.alpha[:, 0], self.sigma[:, 0], self.atoms, query, atom)
        self._add_to_total(query[rough], logit[rough])
        new = query, atom, logit
        both = (torch.cat(pair) for pair in zip(self.found, new, strict=True))
        self.found = first_k(*both, len(self.x), self.k)
        self.waiting, self.count = [], 0

    def _add_to_total(self, query: Tensor, logit: Tensor) -> None:
        order = query.argsort(stable=True)
        some, counts = query[order].unique_consecutive(return_counts=True)
        parts = logit[order].split(counts.tolist())
        for q, part in zip(some.tolist(), parts, strict=True):
            self.log_total[q] = torch.logaddexp(self.log_total[q], part.logsumexp(0))

    def result(self) -> Heaviest:
        self._evaluate()
        _, atom, logit = self.found
        return Heaviest(atom.view(-1, self.k), logit.view(-1, self.k), self.log_total)
