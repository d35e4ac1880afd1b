"""A pass over those atoms of the files that can carry weight, with a bound on all others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._merge import merge
from ..._torch import diagnosis
from ..._torch.errors import Unsupported
from ...certified.certificate import Certificate
from ...partial import Partial
from .._reporting import reporting
from ._index import Indexes
from ._pass import Pass
from ._search import Left, Run, Search, Sparse

__all__ = ["Found", "Searches", "chunks", "find", "partial_within"]

_QUERIES = 256  # that are searched for together
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
    certificate: Certificate  # on the queries' device


class Searches:
    """The searches through the indexes of a cloud. The last one is kept: a solver asks for product
    after product at the same queries.
    """

    def __init__(self, indexes: Indexes) -> None:
        self.indexes = indexes
        self._asked: tuple[Tensor, ...] = ()
        self._how: object = None
        self._found: Found | None = None

    def found(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, numbers: Sequence[int], tolerance: float
    ) -> Found:
        """As `find`."""
        asked, how = (x.detach(), alpha.detach(), sigma.detach()), (list(numbers), tolerance)
        if self._found is None or self._how != how or not _same(asked, self._asked):
            diagnosis.diagnose(dict(zip(("x", "alpha", "sigma"), asked, strict=True)), None)
            self._found = find(self.indexes, *asked, numbers, tolerance)
            self._asked, self._how = tuple(t.clone() for t in asked), how
        return self._found


def find(
    held: Indexes,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    numbers: Sequence[int],
    tolerance: float,
    k: int = 1,
) -> Found:
    """The atoms of some files that may be among the k heaviest of queries x ``[B, *E]``, or without
    which more than `tolerance` of the mass might be missing. Levels are [B].
    """
    device, event = x.device, x.shape[1:]
    x, alpha, sigma = (t.detach().cpu().double() for t in (x.flatten(1), alpha, sigma))
    gap = math.log(sum(held.sizes) / tolerance) + 1e-6  # for the rounding of sums
    left, bounds = [], []
    for q in range(0, max(1, len(x)), _QUERIES):
        some = slice(q, q + _QUERIES)
        search = Search(x[some], alpha[some], sigma[some], held, numbers, gap, k)
        left.append({i: _moved(of_file, q) for i, of_file in search.run().items()})
        bounds.append((search.lower[:, 0], search.log_dropped))
    selected = torch.zeros(len(x), dtype=torch.int64, device="cpu")
    for runs, sparse in (of_file for group in left for of_file in group.values()):
        selected += sparse.query.bincount(minlength=len(x))
        for run in runs:
            selected[run.queries] += run.last - run.first
    heaviest, dropped = (torch.cat(t) for t in zip(*bounds, strict=True))
    centre, radius = held.ball()
    parts = (heaviest, dropped, selected, centre.view(event), radius)
    return Found(left, Certificate(*(t.to(device) for t in parts)))


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


def partial_within(
    over: Pass,
    searches: Searches,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    v: Tensor | None,
    tolerance: float,
) -> Partial:
    """The Partial of the atoms that count, with its certificate."""
    given = [t for t in (x, alpha, sigma, v) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise Unsupported(
            "tolerance: expected None where x, alpha, sigma or v requires a gradient, got "
            f"{tolerance}: a search has no derivatives"
        )
    with torch.no_grad():
        over.nothing(x, alpha, sigma, v)  # checks their shapes
        found = searches.found(x, alpha, sigma, over.numbers, tolerance)
        return _partial_of_some(over, found, x, alpha, sigma, v)


def _partial_of_some(
    over: Pass, found: Found, x: Tensor, alpha: Tensor, sigma: Tensor, v: Tensor | None
) -> Partial:
    """The Partial of those atoms that a search has found, without a graph. Levels are [B]."""
    total = nothing = over.nothing(x, alpha, sigma, v)
    done, rows = 0, sum(over.files.sizes[i] for i in over.numbers)
    with reporting("atoms", over.callback, over.progress, rows) as report:
        for i in over.numbers:
            part = nothing
            for chunk in chunks(found, i, over.count):
                y, q = over.files.gather(i, chunk.atoms), chunk.queries.to(x.device)
                given = x[q], alpha[q], sigma[q], None if v is None else v[q]
                part = merge([part, _among_all(nothing, over.block(y, *given, chunk.lists), q)])
            total = merge([total, part])
            done += over.files.sizes[i]
            report(done, rows)
    log_weight = torch.full_like(total.log_weight, math.log(rows) if rows else -math.inf)
    return replace(total, log_weight=log_weight, certificate=found.certificate)


def _among_all(nothing: Partial, part: Partial, queries: Tensor) -> Partial:
    """The Partial of all queries, from that of some."""
    moments: dict[str, Any] = {}
    for name in (*_PER_QUERY, *_IF_ASKED):
        whole, some = getattr(nothing, name), getattr(part, name)
        moments[name] = None if whole is None else whole.index_copy(0, queries, some)
    return replace(nothing, log_weight=part.log_weight, **moments)


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether these are tensors of the same numbers on the same devices."""
    return all(
        s.dtype == t.dtype and s.device == t.device and torch.equal(s, t)
        for s, t in zip(a, b, strict=True)
    )


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
        yield Chunk(i, atoms, queries, (place, counts))
