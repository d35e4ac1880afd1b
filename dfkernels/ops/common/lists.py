"""The data-set ops over lists: every query counts the atoms that it is given, as by `kept_atoms`,
and no other.

dfkernels::kept_<op> takes what <op> takes and atoms, counts: int64 [M] and [B], the atoms of one
query after another, ascending. log_prior stays that of all atoms.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..._torch import check, library
from ..._torch.errors import UnusableValue

_KEPT = {}  # op -> its kept_ op


def define(op, schema: str, fake: Callable, fast: Callable | None = None, density: bool = False):
    """Declares kept_<op>; density: the first result is a log-density."""
    arguments, _, results = schema.partition(")")
    names = [a.name for a in op._schema.arguments]
    y, log_prior = names.index("y"), names.index("log_prior")

    def query_by_query(args, prior_of_all, clouds):
        outs, total = [], prior_of_all.logsumexp(0) if density else None
        for b, (atoms, prior) in enumerate(clouds):
            one = [a[b : b + 1] if _is_tensor(a) else a for a in args]
            one[y], one[log_prior] = atoms, prior
            out = op(*one)
            if density:  # of all atoms, not of those that are left
                out = (out[0] + prior.logsumexp(0) - total, *out[1:])
            outs.append(out)
        if not outs:
            return fake(*args)
        return (
            torch.cat(outs)
            if _is_tensor(outs[0])
            else tuple(map(torch.cat, zip(*outs, strict=True)))
        )

    def _log_prior(args):
        return args[0].new_zeros(args[y].shape[0]) if args[log_prior] is None else args[log_prior]

    def in_pytorch(*args):
        *args, atoms, counts = args
        prior = _log_prior(args)
        lists = _lists(atoms, counts, len(prior))
        return query_by_query(args, prior, ((args[y][rows], prior[rows]) for rows in lists))

    def twin(*args):
        """By masks, which can be traced; y as it is, of which derivatives would keep copies."""
        *args, atoms, counts = args
        prior = _log_prior(args)
        masks = _masks(atoms, counts, len(prior))
        return query_by_query(
            args, prior, ((args[y], torch.where(mask, prior, -math.inf)) for mask in masks)
        )

    name = "kept_" + op._schema.name.removeprefix(library.NAMESPACE + "::")
    _KEPT[op] = library.define(
        name,
        f"{arguments}, Tensor atoms, Tensor counts){results}",
        fallback=in_pytorch,
        fake=lambda *args: fake(*args[:-2]),
        twin=twin,
        fast=fast,
        batch=library.folded(
            name, "a" * (len(names) + 2)
        ),  # one call per element: lists do not fold
    )
    return _KEPT[op]


def _is_tensor(a):
    return isinstance(a, torch.Tensor)


def _masks(atoms, counts, N):
    """[B, N]: which atoms a query counts."""
    B, M = counts.shape[0], atoms.shape[0]
    query = torch.arange(B, dtype=torch.int64, device=atoms.device).repeat_interleave(
        counts, output_size=M
    )
    return atoms.new_zeros(B, N, dtype=torch.bool).index_put(
        (query, atoms), atoms.new_ones(M).bool()
    )


def _lists(atoms, counts, N):
    """The atoms of each query."""
    sizes = counts.tolist()
    if min(sizes, default=1) < 1 or sum(sizes) != len(atoms):
        raise UnusableValue(
            f"counts: expected at least one atom per query, {len(atoms)} in all, got {sizes}"
        )
    rises = atoms.diff() > 0
    rises[counts.cumsum(0)[:-1] - 1] = True  # from one query to the next
    if not bool(rises.all() & (atoms >= 0).all() & (atoms < N).all()):
        raise UnusableValue(
            f"atoms: expected numbers of {N} rows, each query's ascending, got {atoms}"
        )
    return atoms.split(sizes) if sizes else ()


def call(op, args, kept: tuple[torch.Tensor, torch.Tensor] | None, **given):
    """`check.call` of op or, for kept = (atoms, counts), of its kept_ op."""
    if kept is None:
        return check.call(op, args, **given)
    check.lists("kept", kept, args[0])
    return check.call(_KEPT[op], (*args, *kept), **given)
