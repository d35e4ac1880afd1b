# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""The arguments of a data-set op, prepared for its Triton kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..moments import load

NEAR = 2  # a query is near the cloud, for its noise, if |x - alpha centre|^2 <= NEAR d sigma^2
SAMPLED = 64  # atoms whose mean is the centre


class Anchored(NamedTuple):
    """Every query as x = anchor + rest, so that with a = anchor - alpha y

        |x - alpha y|^2 = |rest|^2 + <a, a + 2 rest>

    where |rest|^2, the same for all atoms, is left out of the logits. Near the cloud the anchor is
    alpha times its centre; elsewhere it is x, and the rest is 0.
    """

    stored_centre: Tensor  # [d]: the centre as atoms are stored; the centre is scale * it + offset
    centre: Tensor  # [d]: roughly the middle of the cloud
    anchor: Tensor  # [B, d]
    rest: Tensor  # [B, d]
    near: Tensor  # [B], bool
    common: Tensor  # [B], double: -|rest|^2/(2 sigma^2), what the logits leave out


class Lists(NamedTuple):
    """The atoms that each query counts, as ../lists.py has them."""

    atoms: Tensor  # int64 [pairs]: rows of y, those of one query after those of another
    first: Tensor  # int64 [B + 1]: where each query's begin, and where the last ones end
    sizes: list[int]

    @classmethod
    def of(cls, atoms: Tensor | None, counts: Tensor | None) -> Lists | None:
        """The checked arguments of an op, or None where there are none."""
        if atoms is None:
            return None
        first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return cls(atoms.contiguous(), first, counts.tolist())

    def part(self, s: slice) -> Lists:
        """The lists of some queries."""
        before, sizes = sum(self.sizes[: s.start]), self.sizes[s]
        atoms = self.atoms[before : before + sum(sizes)]
        return Lists(atoms, self.first[s.start : s.start + len(sizes) + 1] - before, sizes)


class Problem(NamedTuple):
    """One call of a data-set op: contiguous tensors (except for the rows of y), log pi normalised.

    A target is a query, or a query with one of its vectors v.
    """

    x: Tensor  # [B, d]
    y: Tensor  # [N, d], rows y.stride(0) apart; the atoms are scale * y + offset
    v: Tensor | None  # [B, K, d]
    alpha: Tensor  # [B]
    sigma: Tensor  # [B]
    log_pi: Tensor | None  # [N], natural logarithms; None: uniform
    scale: float
    offset: float
    queries: Anchored | None = None  # what logits are computed from, but for those of one pass
    lists: Lists | None = None  # None: every query counts all atoms

    def rows(self, s: slice | Tensor) -> Problem:
        """The call for some of the queries, or for all in another order."""
        q = self.queries
        if q is not None:
            q = q._replace(anchor=q.anchor[s], rest=q.rest[s], near=q.near[s], common=q.common[s])
        v = None if self.v is None else self.v[s]
        lists = None if self.lists is None else self.lists.part(s)
        some = {"x": self.x[s], "v": v, "alpha": self.alpha[s], "sigma": self.sigma[s]}
        return self._replace(**some, queries=q, lists=lists)

    @property
    def targets(self) -> int:
        return self.x.shape[0] if self.v is None else self.v.shape[0] * self.v.shape[1]

    @property
    def longest(self) -> int:
        """How many atoms a query counts, at most."""
        return self.y.shape[0] if self.lists is None else max(self.lists.sizes)

    def per_pair(self, rows: int) -> Tensor:
        """Memory for a number of every atom that counts, for so many rows: [rows, N]; with lists,
        where a query has rows/B of them, those of one query's list after those of another's."""
        if self.lists is None:
            return self.x.new_empty(rows, self.y.shape[0])
        return self.x.new_empty(rows // self.x.shape[0] * len(self.lists.atoms))

    @property
    def gap(self) -> float:
        """An atom lighter than 2^-gap of the heaviest is negligible: all N together stay far below
        one rounding."""
        return math.log2(self.y.shape[0] + 1) + (24 if self.x.dtype == torch.float32 else 53) + 14

    @property
    def atom_arguments(self) -> dict[str, Any]:
        """What every kernel that reads atoms takes, by keyword."""
        return {
            "y": self.y,
            "log_pi": self.log_pi,
            "N": self.y.shape[0],
            "d": self.y.shape[1],
            "y_stride": self.y.stride(0),
            "scale": self.scale,
            "offset": self.offset,
            "PRIOR": self.log_pi is not None,
            "AFFINE": (self.scale, self.offset) != (1.0, 0.0),
        }

    @property
    def list_arguments(self) -> dict[str, Tensor | None]:
        """What kernels that know lists take beside them."""
        if self.lists is None:
            return {"atoms": None, "first": None}
        return {"atoms": self.lists.atoms, "first": self.lists.first}


def stored_atoms(x: Tensor, y: Tensor, scale: float, offset: float) -> tuple[Tensor, float, float]:
    """y with rows that kernels can read, and scale and offset as they may be given to kernels."""
    if y.stride(1) != 1 or y.stride(0) >= 2**22:
        y = y.contiguous()
    if x.dtype == torch.float64 and (scale, offset) != (1.0, 0.0):
        # a kernel would receive scale and offset as float32
        y, scale, offset = load(y, x.dtype, scale, offset), 1.0, 0.0
    return y, scale, offset


def centre_of(y: Tensor, log_pi: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The mean of some stored atoms that are not masked, [d]; any point would do, a close one costs
    the fewest digits. Of whole numbers it is a whole number."""
    some = slice(None, None, max(1, y.shape[0] // SAMPLED))
    atoms = y[some].to(dtype)
    if log_pi is None:
        centre = atoms.mean(0)
    else:
        valid = (log_pi[some] > -math.inf)[:, None]
        centre = torch.where(valid, atoms, 0).sum(0) / valid.sum().clamp_min(1)
    return centre.round() if y.dtype == torch.uint8 else centre


def centres(p: Problem) -> tuple[Tensor, Tensor]:
    """`stored_centre` and `centre` of a call."""
    stored = centre_of(p.y, p.log_pi, p.x.dtype)
    return stored, load(stored, p.x.dtype, p.scale, p.offset)


def anchored(p: Problem) -> Anchored:
    """The queries of a call, and the centre of its atoms."""
    stored, centre = centres(p)
    anchor = p.alpha[:, None] * centre
    rest = p.x - anchor
    square, variance = rest.double().square().sum(1), p.sigma.double().square()
    near = square <= NEAR * p.x.shape[1] * variance
    common = torch.where(near, -square / (2 * variance), 0)
    anchor, rest = (torch.where(near[:, None], *t) for t in ((anchor, p.x), (rest, 0.0)))
    return Anchored(stored, centre, anchor, rest, near, common)


def make_problem(
    x: Tensor,
    y: Tensor,
    v: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    log_prior: Tensor | None,
    scale: float,
    offset: float,
    *,
    normalised: bool = False,
    lists: Lists | None = None,
    anchor: bool = True,
) -> Problem:
    """The prepared form of an op's flat arguments.

    Args:
        x, y, v, alpha, sigma, log_prior, scale, offset: those of an op.
        normalised: log_prior is log pi already.
        lists: the atoms that each query counts.
        anchor: False: `queries` will not be used.
    """
    y, scale, offset = stored_atoms(x, y, scale, offset)
    if log_prior is not None:
        log_prior = log_prior.contiguous() if normalised else torch.log_softmax(log_prior, 0)
    v = None if v is None else v.contiguous()
    p = Problem(
        x.contiguous(), y, v, alpha.contiguous(), sigma.contiguous(), log_prior, scale, offset
    )
    return p._replace(queries=anchored(p) if anchor else None, lists=lists)
