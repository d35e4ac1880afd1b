"""A pass over those atoms of the files that can carry weight, with a bound on all others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...certified.certificate import Certificate
from ...partial import Partial, merge
from ._index import Indexes
from ._search import Left, Run, Search, Sparse

__all__ = ["Chunk", "chunks", "find", "partial_of_some"]

_QUERIES = 256  # that are searched for together
_MUCH = 0.5  # a query that counts more than this part of the atoms read counts all of them
_PER_QUERY = ("log_mass", "mean", "variance", "weight_square")
_IF_ASKED = ("covariance_product", "covariance_diagonal")


class Chunk(NamedTuple):
    """Atoms of a file that are read together, and the queries that they count for."""

    file: int
    atoms: Tensor  # int64 [m], rising
    queries: Tensor  # int64 [Q], rising
    lists: tuple[Tensor, Tensor] | None  # which of the atoms each query counts; None for all


class Found(NamedTuple):
    """What a search has found."""

    left: list[dict[int, Left]]  # by file, of one group of queries after the other
    log_heaviest: Tensor  # [B], as in Certificate
    log_dropped: Tensor


def find(
    held: Indexes, part: Partial, numbers: Sequence[int], tolerance: float, k: int = 1
) -> Found:
    """The atoms of some files that may be among the k heaviest of a Partial's queries, and those
    without which more than `tolerance` of the mass might be missing.
    """
    x, alpha, sigma = (t.detach().cpu().double() for t in (part.x, part.alpha, part.sigma))
    gap = math.log(sum(held.sizes) / tolerance) + 1e-6  # for the rounding of sums
    found = []
    for q in range(0, max(1, len(x)), _QUERIES):
        some = slice(q, q + _QUERIES)
        search = Search(x[some].flatten(1), alpha[some], sigma[some], held, numbers, gap, k)
        left = {i: _moved(of_file, q) for i, of_file in search.run().items()}
        found.append((left, search.lower[:, 0], search.log_dropped))
    left, heaviest, dropped = zip(*found, strict=True)
    return Found(list(left), torch.cat(heaviest), torch.cat(dropped))


def chunks(found: Found, i: int, count: int) -> Iterator[Chunk]:
    """What is to be read of a file, at most `count` atoms at a time."""
    for left in found.left:
        if i in left:
            for run in _joined(left[i].runs):
                for first in range(run.first, run.last, count):
                    last = min(first + count, run.last)
                    atoms = torch.arange(first, last, dtype=torch.int64, device="cpu")
                    yield Chunk(i, atoms, run.queries, None)
            yield from _sparse_chunks(i, left[i].sparse, count)


def partial_of_some(
    held: Indexes,
    nothing: Partial,
    of: Callable[[Tensor, Tensor, tuple[Tensor, Tensor] | None], Partial],
    numbers: Sequence[int],
    tolerance: float,
    count: int,
    report: Callable[[int, int], None],
) -> Partial:
    """The Partial of some files, with its certificate.

    Args:
        held: the indexes.
        nothing: the Partial of no atoms.
        of: (queries, stored atoms, lists) -> the Partial of some queries.
        numbers: of the files.
        tolerance: of the mass, which may be left out.
        count: how many atoms are read together.
        report: (rows, all rows) after each file, read or not.
    """
    found = find(held, nothing, numbers, tolerance)
    total, selected = nothing, torch.zeros(len(nothing.x), dtype=torch.int64, device="cpu")
    done, rows = 0, sum(held.sizes[i] for i in numbers)
    for i in numbers:
        part = nothing
        for chunk in chunks(found, i, count):
            of_some = of(chunk.queries, held.rows(i, chunk.atoms), chunk.lists)
            part = merge([part, _among_all(nothing, of_some, chunk.queries)])
            selected[chunk.queries] += len(chunk.atoms) if chunk.lists is None else chunk.lists[1]
        total = merge([total, part])
        done += held.sizes[i]
        report(done, rows)
    x = nothing.x
    centre, radius = held.ball()
    bounds = found.log_heaviest, found.log_dropped, selected
    bounds = [t.to(x.device) for t in (*bounds, centre.view(x.shape[1:]), radius)]
    log_weight = torch.full_like(nothing.log_weight, math.log(rows) if rows else -math.inf)
    return replace(total, log_weight=log_weight, certificate=Certificate(*bounds))


def _among_all(nothing: Partial, part: Partial, queries: Tensor) -> Partial:
    """The Partial of all queries, from that of some."""
    queries, moments = queries.to(nothing.x.device), {}
    for name in (*_PER_QUERY, *_IF_ASKED):
        whole, some = getattr(nothing, name), getattr(part, name)
        moments[name] = None if whole is None else whole.index_copy(0, queries, some)
    return replace(nothing, log_weight=part.log_weight, **moments)


def _moved(left: Left, by: int) -> Left:
    """With other numbers for the queries."""
    runs = [run._replace(queries=run.queries + by) for run in left.runs]
    return Left(runs, left.sparse._replace(query=left.sparse.query + by))


def _joined(runs: Sequence[Run]) -> Iterator[Run]:
    """Runs of the same queries, one of which goes on from the other, as one."""
    before = None
    for run in runs:
        goes_on = before is not None and before.last == run.first
        if before is not None and goes_on and torch.equal(before.queries, run.queries):
            before = before._replace(last=run.last)
            continue
        if before is not None:
            yield before
        before = run
    if before is not None:
        yield before


def _sparse_chunks(i: int, pairs: Sparse, count: int) -> Iterator[Chunk]:
    for atoms in pairs.atom.unique().split(count):
        if not len(atoms):
            return
        here = (pairs.atom >= atoms[0]) & (pairs.atom <= atoms[-1])
        query, place = pairs.query[here], torch.searchsorted(atoms, pairs.atom[here])
        order = (query * len(atoms) + place).argsort()
        query, place = query[order], place[order]
        queries, counts = query.unique_consecutive(return_counts=True)
        much = counts > _MUCH * len(atoms)
        if bool(much.any()):
            yield Chunk(i, atoms, queries[much], None)
        if not bool(much.all()):
            few = ~much.repeat_interleave(counts)
            yield Chunk(i, atoms, queries[~much], (place[few], counts[~much]))
