"""The data-set ops over lists: every query counts the atoms that it is given, as by `kept_atoms`, and no other.

dfkernels::kept_<op> takes what <op> takes and atoms, counts: int64 [M] and [B], the atoms of one query after
another. log_prior stays that of all atoms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import _check, _op

_KEPT = {}  # op -> its kept_ op


def define(op, schema: str, fake: Callable, fast: Callable | None = None, share: bool = False):
    """Declares kept_<op>; share: the first result is a log-density."""
    arguments, _, results = schema.partition(")")
    names = [a.name for a in op._schema.arguments]

    def in_pytorch(*args):
        *args, atoms, counts = args
        given = dict(zip(names, args, strict=True))
        lists = _lists(atoms, counts, given["y"].shape[0])
        queries = [
            op(*(_of_query(name, a, b, rows) for name, a in given.items())) for b, rows in enumerate(lists)
        ]
        if not queries:
            return fake(*args)
        if isinstance(queries[0], torch.Tensor):
            return torch.cat(queries)
        first, *others = (torch.cat(o) for o in zip(*queries, strict=True))
        return first + _log_share(given, counts, lists) if share else first, *others

    name = "kept_" + op._schema.name.removeprefix(_op.NAMESPACE + "::")
    _KEPT[op] = _op.define(
        name,
        f"{arguments}, Tensor atoms, Tensor counts){results}",
        fallback=in_pytorch,
        fake=lambda *args: fake(*args[:-2]),
        twin=in_pytorch,
        fast=fast,
        batch=_op.folded(name, "a" * (len(names) + 2)),  # one call per element: lists do not fold
    )
    return _KEPT[op]


def _of_query(name, a, b, rows):
    if not isinstance(a, torch.Tensor):
        return a
    return a[rows] if name in ("y", "log_prior") else a[b : b + 1]


def _lists(atoms, counts, N):
    sizes = counts.tolist()
    if any(n < 1 for n in sizes) or sum(sizes) != len(atoms):
        raise RuntimeError(f"counts: expected at least one atom per query, {len(atoms)} in all, got {sizes}")
    lists = atoms.split(sizes)
    for rows in lists:
        if rows[0] < 0 or rows[-1] >= N or bool((rows.diff() <= 0).any()):
            raise RuntimeError(
                f"atoms: expected numbers of {N} rows, each query's ascending, got {rows.tolist()}"
            )
    return lists


def _log_share(given, counts, lists):
    """log of the part of pi that a query's atoms have."""
    prior = given["log_prior"]
    if prior is None:
        return (counts / given["y"].shape[0]).log().to(given["x"].dtype)
    return torch.stack([prior[rows].logsumexp(0) for rows in lists]) - prior.logsumexp(0)


def call(op, args, kept: tuple[torch.Tensor, torch.Tensor] | None, **given):
    """`_check.call` of op or, for kept = (atoms, counts), of its kept_ op."""
    if kept is None:
        return _check.call(op, args, **given)
    _check.lists("kept", kept, args[0])
    return _check.call(_KEPT[op], (*args, *kept), **given)
