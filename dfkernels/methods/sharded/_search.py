"""Which atoms of the files can carry weight for some queries, found through the files' indexes.

The first level of all indexes is looked at before anything else is read. Its estimates name a few
atoms, whose exact logits bound the largest one from below. Where no atom of a file can come near
that, the file has been read as far as it ever is; of the others the second level is read, for the
atoms that are left. The best exact logit rises on the way, and in the end everything is held
against the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._constants import CODE_TILE
from ...certified.rounding import FEW_ROUNDINGS, UNIT
from ...certified.shard_bounds import ShardQueries, log_sum, lower_logits
from ...certified.stored_index import AtomCodes
from ._index import Indexes

__all__ = ["Left", "Run", "Search", "Sparse"]

_PAIRS = 1 << 18  # pairs of a query and an atom whose bounds are computed together
_CODES = 1 << 22  # numbers of the second level that are read together
_SAMPLE = 64  # atoms on which the second level is tried out
_MUCH = 0.25  # a query that may need more than this part of a block takes all of it


class Run(NamedTuple):
    """Atoms from `first` to `last` - 1 of a file, all of which count for some queries."""

    first: int
    last: int
    queries: Tensor  # int64, their numbers


class Sparse(NamedTuple):
    """Pairs of a query and an atom of a file that counts for it, each [P]."""

    query: Tensor
    atom: Tensor
    upper: Tensor  # bounds of the logits


class Left(NamedTuple):
    """What may count of a file."""

    runs: list[Run]
    sparse: Sparse


class Search:
    """Atoms of some files that may be among the k heaviest, or whose weight may matter.

    Args:
        x: [Q, d], with alpha and sigma [Q], in float64 on the CPU.
        held: the files, with their indexes.
        numbers: of those that are searched.
        gap: An atom may count if its logit is at most this below the largest.
        k: How many of the heaviest are sought.
    """

    def __init__(
        self,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        held: Indexes,
        numbers: Sequence[int],
        gap: float,
        k: int,
    ) -> None:
        self.x, self.alpha, self.sigma = x, alpha, sigma
        self.held, self.numbers, self.gap, self.k = held, numbers, gap, k
        self.lower = x.new_full((len(x), k), -torch.inf)  # of k atoms, the largest first
        self.known = torch.full_like(self.lower, -1, dtype=torch.int64)  # which these are
        self.log_dropped = x.new_full((len(x),), -torch.inf)

    def run(self) -> dict[int, Left]:
        """What may count, by the numbers of the files."""
        surveyed, left = self._survey(), {}
        for i in self.numbers:
            most, total = surveyed[i]
            near = ~(most < self.threshold)
            self._drop(torch.where(near, -torch.inf, total), _all(self.x))
            if bool(near.any()):
                left[i] = self._look_into(i, near.nonzero()[:, 0])
        return {i: Left(found.runs, self._pruned(found.sparse)) for i, found in left.items()}

    @property
    def threshold(self) -> Tensor:
        """An atom whose bound lies below this, [Q], does not count."""
        return torch.minimum(self.lower[:, -1], self.lower[:, 0] - self.gap)

    def _survey(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Of each file the largest bound at the first level and the log-sum of all, [Q] each. The
        atoms with the best estimates and the largest bounds of all files are evaluated.
        """
        found = {}
        estimates, bounds = _Best(self.x, self.k), _Best(self.x, 1)
        for i in self.numbers:
            queries = self._queries(i, _all(self.x))
            most = total = queries.remote()
            for first, codes in self._blocks(i):
                _, estimate, upper = queries.coarse(codes)
                start = self.held.starts[i] + first
                estimates.add(estimate, start)
                bounds.add(upper, start)
                most = torch.maximum(most, upper.amax(1))
                total = log_sum(total, _log_total(upper))
            found[i] = most, total
        self._evaluate(torch.cat([estimates.rows, bounds.rows], 1), _all(self.x))
        return found

    def _look_into(self, i: int, near: Tensor) -> Left:
        """What may count of a file for some queries."""
        remote, takes_all = self._remote(i, near)
        self._drop(remote[~takes_all], near[~takes_all])
        runs = [Run(0, self.held.sizes[i], near[takes_all])]
        near = near[~takes_all]
        pairs = [Sparse(near[:0], near[:0], self.x.new_empty(0))]
        queries = self._queries(i, near)
        for first, codes in self._blocks(i) if len(near) else ():
            run, sparse = self._look_at(_Block(i, first, near, queries), codes)
            runs.append(run)
            pairs.append(sparse)
        runs = [run for run in runs if len(run.queries)]
        return Left(runs, self._pruned(Sparse(*map(torch.cat, zip(*pairs, strict=True)))))

    def _remote(self, i: int, near: Tensor) -> tuple[Tensor, Tensor]:
        """The bound of a file's remote atoms together, and whether one of them may count."""
        queries = self._queries(i, near)
        remote = queries.remote()
        return remote, ~(remote < self.threshold[near]) & (queries.limits.remote_count > 0)

    def _look_at(self, block: _Block, codes: AtomCodes) -> tuple[Run, Sparse]:
        """What may count of a block: all of it for some queries, atoms of it for others."""
        n = len(codes.atom_norm)
        product, _, upper = block.queries.coarse(codes)
        upper = self._above(upper, block.near)
        count = (upper > -torch.inf).sum(1).double()
        fine = self.held.of(block.file).has_fine_level
        if fine and bool((count > _MUCH * n).any()):  # does the second level leave less?
            some = (upper > -torch.inf).any(0).nonzero()[:, 0]
            some = some[:: max(1, len(some) // _SAMPLE)]
            tried = self._finer(block, some, product, upper)
            kept = ~(tried < self.threshold[block.near][:, None]) & (tried > -torch.inf)
            count *= kept.sum(1) / (upper[:, some] > -torch.inf).sum(1).clamp_min(1)
        takes_all = count > _MUCH * n
        upper = upper.masked_fill(takes_all[:, None], -torch.inf)
        if fine:
            atoms = (upper > -torch.inf).any(0).nonzero()[:, 0]
            for some in atoms.split(max(1, _CODES // self.x.shape[1])) if len(atoms) else ():
                finer = self._finer(block, some, product, upper)
                upper[:, some] = self._above(finer, block.near)
        query, atom = (upper > -torch.inf).nonzero().unbind(1)
        run = Run(block.first, block.first + n, block.near[takes_all])
        return run, Sparse(block.near[query], atom + block.first, upper[query, atom])

    def _finer(self, block: _Block, atoms: Tensor, product: Tensor, upper: Tensor) -> Tensor:
        """The bounds [Q, m] of some of a block's atoms at the second level; the atoms with the best
        estimates are evaluated.
        """
        codes = self.held.of(block.file).fine(atoms + block.first)
        estimate, finer = block.queries.fine(codes, product[:, atoms])
        finer = torch.minimum(upper[:, atoms], finer)
        top = estimate.masked_fill(finer == -torch.inf, -torch.inf).topk(min(self.k, len(atoms)), 1)
        rows = atoms[top.indices] + (block.first + self.held.starts[block.file])
        better = top.values > self.lower[block.near, -1:]
        self._evaluate(torch.where(better, rows, -1), block.near)
        return finer

    def _evaluate(self, rows: Tensor, near: Tensor) -> None:
        """Takes note of atoms [Q, c] of some queries, by their numbers in all files; -1 is none."""
        query, column = (rows >= 0).nonzero().unbind(1)
        if not len(query):
            return
        logits = torch.full_like(rows, -torch.inf, dtype=torch.float64)
        step = max(1, _CODES // self.x.shape[1])
        for q, c in zip(query.split(step), column.split(step), strict=True):
            numbers, place = rows[q, c].unique(return_inverse=True)
            at = near[q]
            given = self.x[at], self.alpha[at], self.sigma[at]
            logits[q, c] = lower_logits(*given, self.held.values(numbers)[place])
        values = torch.cat([self.lower[near], logits], 1)
        names, order = torch.cat([self.known[near], rows], 1).sort(dim=1, stable=True)
        values = values.gather(1, order)
        values[:, 1:].masked_fill_(names[:, 1:] == names[:, :-1], -torch.inf)
        best = values.topk(self.k, 1)
        self.lower[near], self.known[near] = best.values, names.gather(1, best.indices)

    def _above(self, upper: Tensor, near: Tensor) -> Tensor:
        """The bounds, -inf for the atoms that are dropped."""
        gone = upper < self.threshold[near][:, None]
        self._drop(_log_total(upper.masked_fill(~gone, -torch.inf)), near)
        return upper.masked_fill(gone, -torch.inf)

    def _pruned(self, found: Sparse) -> Sparse:
        """The pairs that are still to be counted."""
        gone = found.upper < self.threshold[found.query]
        best = self.lower[:, 0].nan_to_num(neginf=0)
        weight = (found.upper - best[found.query])[gone].exp()
        total = torch.zeros_like(best).index_add_(0, found.query[gone], weight) * FEW_ROUNDINGS
        self._drop(total.log() + best, _all(self.x))
        return Sparse(*(t[~gone] for t in found))

    def _drop(self, total: Tensor, near: Tensor) -> None:
        self.log_dropped[near] = log_sum(self.log_dropped[near], total)

    def _queries(self, i: int, near: Tensor) -> ShardQueries:
        index = self.held.of(i).without_atoms()
        return ShardQueries(self.x[near], self.alpha[near], self.sigma[near], index)

    def _blocks(self, i: int) -> Iterator[tuple[int, AtomCodes]]:
        """The first level of a file, block by block, with the number of the first atom."""
        index = self.held.of(i)
        n = max(1, _PAIRS // max(1, len(self.x)) // CODE_TILE) * CODE_TILE
        for first in range(0, index.N, n):
            yield first, index.coarse(first, min(first + n, index.N))


class _Block(NamedTuple):
    """Where a block of atoms begins, and the queries that look at it."""

    file: int
    first: int
    near: Tensor  # int64, their numbers
    queries: ShardQueries


class _Best:
    """The m largest values that each query has seen, and whose they are; -1 is nobody."""

    def __init__(self, x: Tensor, m: int) -> None:
        self.values = x.new_full((len(x), m), -torch.inf)
        self.rows = torch.full_like(self.values, -1, dtype=torch.int64)

    def add(self, values: Tensor, start: int) -> None:
        """Looks at values [Q, n] of rows from `start` on."""
        m = self.values.shape[1]
        top = values.topk(min(m, values.shape[1]), 1)
        all_values = torch.cat([self.values, top.values], 1)
        rows = torch.cat([self.rows, top.indices + start], 1)
        best = all_values.topk(m, 1)
        self.values, self.rows = best.values, rows.gather(1, best.indices)


def _log_total(upper: Tensor) -> Tensor:
    """The log-sum [Q] of bounds [Q, n], from above."""
    return upper.logsumexp(1) + (upper.shape[1] * UNIT + FEW_ROUNDINGS - 1)


def _all(x: Tensor) -> Tensor:
    return torch.arange(len(x), dtype=torch.int64, device="cpu")
